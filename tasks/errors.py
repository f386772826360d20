"""Every error a caller can meet, in one tree.

A class states its stable `code`, HTTP `status` and whether trying again can help (`retryable`).
Its docstring's first line is the message users read, and its `hint` says what to do next. An instance may
carry a more exact `detail`. Codes are part of the API: they never change their meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class GatewayError(Exception):
    """The gateway could not handle the request."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    hint: ClassVar[str] = "Report this with the request id; the gateway's log has the traceback."
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, detail: str | None = None, **extensions: Any) -> None:
        self.detail = detail or self.title()
        self.extensions: Mapping[str, Any] = extensions
        #: The request this is about, once it has an id.
        self.request_id: str | None = None
        super().__init__(self.detail)

    @classmethod
    def title(cls) -> str:
        """Return the class docstring's first line: the message shown to users."""
        return (cls.__doc__ or "").strip().splitlines()[0]


# --- What the caller sent -------------------------------------------------------------------------


class InvalidRequest(GatewayError):
    """The request is not valid."""

    code = "invalid_request"
    status = 422
    hint = "See `errors` for each field and what it must be."


class InvalidJson(InvalidRequest):
    """The request body is not valid JSON."""

    code = "invalid_json"
    status = 400
    hint = "Send one JSON object, encoded as UTF-8, with Content-Type: application/json."


class InvalidYaml(InvalidRequest):
    """The YAML cannot be read."""

    code = "invalid_yaml"
    status = 400
    hint = "Send one document in UTF-8, without anchors, aliases or tags, each key once; docs/profiles.md shows one."


class UnsupportedMediaType(InvalidRequest):
    """The request body must be JSON."""

    code = "unsupported_media_type"
    status = 415
    hint = "Send Content-Type: application/json."


class BodyTooLarge(InvalidRequest):
    """The request body is larger than this gateway accepts."""

    code = "body_too_large"
    status = 413
    hint = "Shorten the context, or raise gateway.max_body_bytes."


class PromptTooLong(InvalidRequest):
    """The prompt and its answer do not fit the model's context window."""

    code = "prompt_too_long"
    status = 422
    hint = "Shorten the context or directive, or ask for fewer max_tokens."


class Unsupported(InvalidRequest):
    """The request asks for something that this gateway or its model cannot do."""

    code = "unsupported"
    status = 422
    hint = "Leave the parameter out; nothing is ignored silently here."


class UnknownAgent(InvalidRequest):
    """No active profile has this agent's name."""

    code = "unknown_agent"
    status = 404
    hint = "`agents` lists the names this gateway knows; they are case-sensitive."


class InvalidCursor(InvalidRequest):
    """The cursor is not a position in this stream."""

    code = "invalid_cursor"
    status = 400
    hint = "A cursor is the `id` of a frame you received, such as 1-42; leave it out to read from the start."


class NotFound(GatewayError):
    """There is nothing here by that name."""

    code = "not_found"
    status = 404
    hint = "Check the path and the id. Ids of other organizations are not found either."


class MethodNotAllowed(GatewayError):
    """This path does not answer to that method."""

    code = "method_not_allowed"
    status = 405
    hint = "See the Allow header."


class Unauthenticated(GatewayError):
    """A valid API key is required."""

    code = "unauthenticated"
    status = 401
    hint = "Send `Authorization: Bearer KEY`; `flask keys create` makes a key."


class IdempotencyConflict(GatewayError):
    """This Idempotency-Key was used for another request."""

    code = "idempotency_conflict"
    status = 409
    hint = "Use a new key for a new request; a key may be repeated only with the very same body."


class AlreadyFinished(GatewayError):
    """The request has already ended."""

    code = "already_finished"
    status = 409
    hint = "Read its outcome instead; what has ended cannot be cancelled."


class NotCompleted(GatewayError):
    """The earlier response has no answer that could be continued."""

    code = "not_completed"
    status = 409
    hint = "Wait until it is completed; one that failed or was cancelled cannot be continued."


class ProfileExists(GatewayError):
    """There is already an agent of this name."""

    code = "profile_exists"
    status = 409
    hint = "Post a version to /v1/profiles/{agent}/versions instead, or choose another name."


class VersionConflict(GatewayError):
    """The profile was changed in the meantime."""

    code = "version_conflict"
    status = 409
    hint = "Read the profile again, look at the difference, and send your version on top of the newest one."


class ProfileLimit(GatewayError):
    """This organization has as many of these as it may."""

    code = "profile_limit"
    status = 409
    hint = "`limit` is how many there may be; use another version of an agent that exists."


class ProfileUnusable(InvalidRequest):
    """The served model cannot use this profile."""

    code = "profile_unusable"
    status = 422
    hint = "Shorten the profile, or serve a model with a larger context window; nothing was changed."


class BaseUnusable(InvalidRequest):
    """The profile cannot extend this base."""

    code = "base_unusable"
    status = 422
    hint = "Extend an agent that has an active version and does not itself extend this one; nothing was changed."


class FileInUse(GatewayError):
    """A batch still reads from this file."""

    code = "file_in_use"
    status = 409
    hint = "Delete the file once the batch has ended, or cancel the batch first."


class DeadlinePassed(InvalidRequest):
    """The deadline lies in the past."""

    code = "deadline_passed"
    status = 422
    hint = "Send a deadline in the future, in RFC 3339 with a time zone."


class OriginNotAllowed(GatewayError):
    """Pages of this origin may not open a WebSocket here."""

    code = "origin_not_allowed"
    status = 403
    hint = "Add the page's exact origin, such as https://example.org, to streaming.allowed_origins."


class UpgradeRequired(GatewayError):
    """This path speaks the WebSocket protocol, version 13."""

    code = "upgrade_required"
    status = 426
    hint = "Open it with a WebSocket client; plain HTTP has /v1/tasks/ID/events."


class TooManyWatches(GatewayError):
    """This socket watches as many tasks as one socket may."""

    code = "too_many_watches"
    status = 429
    retryable = True
    hint = "Unwatch a task, wait for one to end, or open another socket; nothing was queued."


# --- What governance decided ----------------------------------------------------------------------


class PolicyVeto(GatewayError):
    """The organization's policy does not allow this request."""

    code = "policy_veto"
    status = 403
    hint = "`veto` names the policy and the reason; choose an allowed provider or leave provider_hint out."


class ProjectUnverified(PolicyVeto):
    """MetaQore could not say how the request's project stands, and nothing runs without its word."""

    code = "project_unverified"
    status = 503
    retryable = True
    retry_after_s = 5
    hint = "Send the same request again after Retry-After; `veto` tells what kept MetaQore from answering."


class UnknownPolicy(GatewayError):
    """No policy has this name."""

    code = "unknown_policy"
    status = 422
    hint = "Use default_local_first, enterprise_residency or compliance_local_only."


class AdminRequired(GatewayError):
    """Only an admin key may change what holds for the whole organization."""

    code = "admin_required"
    status = 403
    hint = "`flask keys create --admin` makes an admin key; any key of the organization may read."


class PolicyConflict(GatewayError):
    """The policy was changed in the meantime."""

    code = "policy_conflict"
    status = 412
    hint = "Read the policy again, look at what changed, and send yours with If-Match set to the new ETag."


class PreconditionRequired(GatewayError):
    """A change must say which version it changes."""

    code = "precondition_required"
    status = 428
    hint = "Send If-Match with the ETag of GET /v1/policy, or `*` to change whatever is in force."


class KeyRevoked(GatewayError):
    """The API key that sent the request was revoked before it ran."""

    code = "key_revoked"
    status = 403
    hint = "Send the request again with a key that is in use; `flask keys list` shows them."


# --- What the gateway needs and does not have -----------------------------------------------------


class ServiceUnavailable(GatewayError):
    """The gateway cannot take new requests right now."""

    code = "service_unavailable"
    status = 503
    retryable = True
    retry_after_s = 5
    hint = "Nothing was queued; send the same request again after Retry-After."


class QueueUnavailable(ServiceUnavailable):
    """The queue cannot be reached, so the request was not accepted."""

    code = "queue_unavailable"


class DatabaseUnavailable(ServiceUnavailable):
    """The database cannot be reached, so the request was not accepted."""

    code = "database_unavailable"


class QueueFull(ServiceUnavailable):
    """The queue holds as many requests as it may."""

    code = "queue_full"
    status = 429
    #: An instance knows from the queue's drain rate when there will probably be room.
    retry_after_s: int = 5  # type: ignore[misc]

    def __init__(self, detail: str | None = None, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class StreamUnavailable(ServiceUnavailable):
    """The response stream cannot be read right now."""

    code = "stream_unavailable"
    hint = "The request itself goes on; reconnect with the last frame's id as Last-Event-ID."


# --- What went wrong while running ----------------------------------------------------------------


class EngineFailed(GatewayError):
    """The model engine failed while running the request."""

    code = "engine_failed"
    status = 502
    retryable = True


class EngineDead(EngineFailed):
    """The model engine is no longer running."""

    code = "engine_dead"
    status = 503


class ModelMismatch(EngineFailed):
    """The worker serves another model than the one the prompt was tokenised for."""

    code = "model_mismatch"
    hint = "Point the gateway and all GPU workers at the same engine.model, then restart them."


class Cancelled(GatewayError):
    """The request was cancelled."""

    code = "cancelled"
    status = 409
    hint = "Somebody cancelled it, or the client of a synchronous call went away."


class Expired(GatewayError):
    """The request's deadline passed before it was answered."""

    code = "expired"
    status = 504
    hint = "Allow more time, or raise its priority."


class AnswerChanged(EngineFailed):
    """The answer was begun again by another worker, and came out differently from what was already sent."""

    code = "answer_changed"
    hint = "Send the request again. The native stream shows both attempts, with a reset between them."


class AttemptsExhausted(EngineFailed):
    """The request was started as often as allowed and never finished."""

    code = "attempts_exhausted"
    retryable = False
    hint = "Look for worker crashes in the audit events of this request."


class QueueLost(GatewayError):
    """The queue lost the request as often as it may be put there again."""

    code = "queue_lost"
    status = 503
    retryable = True
    hint = "Send the request again once the queue is well; `flask requests retry ID` does it for the operator."


class MessageRejected(GatewayError):
    """A queue message was refused because it is not one this gateway wrote."""

    code = "message_rejected"


# --- What stops an export or a follower of the audit trail ----------------------------------------


class TooManyExports(ServiceUnavailable):
    """This gateway runs as many exports as it may."""

    code = "too_many_exports"
    status = 429
    hint = "Wait for one to end, or run `flask audit export` where the database is; audit.max_exports is the limit."


class FollowRefused(GatewayError):
    """The audit trail cannot be followed into this folder."""

    code = "follow_refused"
    hint = "Read docs/audit.md: it says what each refusal means and how to go on."


# --- What stops the start -------------------------------------------------------------------------


class ConfigurationError(GatewayError):
    """The configuration is not usable."""

    code = "configuration_error"
    hint = "Correct gateway.json or the environment variable named above, then start again."


class ProfileError(ConfigurationError):
    """An agent profile is not usable."""

    code = "profile_error"
    hint = "Correct the profile's YAML file; docs/profiles.md describes the format."


def by_code(code: str | None) -> type[GatewayError]:
    """Return the class with this stable code; an unknown code, as of a newer release, is a plain GatewayError."""
    waiting: list[type[GatewayError]] = [GatewayError]
    while waiting:
        candidate = waiting.pop()
        if candidate.code == code:
            return candidate
        waiting.extend(candidate.__subclasses__())
    return GatewayError
