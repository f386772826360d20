"""A request's way in, from HTTP body to queue. Read this first.

    authenticate → parse → decide (governance) → assemble (token ids) → admit (one commit) → publish

Nothing is queued before its audit events are durable, and every authenticated request leaves events, refused ones
too: a refusal is recorded, then answered. If the queue cannot take an admitted request, it is recorded as failed and
answered with 503, so that no client is told "accepted" for work that nobody will do.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from gateway_app.assembly import assemble
from gateway_app.governance.api_keys import Caller
from gateway_app.governance.interceptor import GovernanceInterceptor
from gateway_app.profiles import Profiles
from tasks import lifecycle
from tasks.audit.events import Subject
from tasks.crypto import KeyWrapper, seal
from tasks.db import Database
from tasks.errors import DatabaseUnavailable, GatewayError, InvalidJson, InvalidRequest, PolicyVeto, QueueUnavailable
from tasks.ids import new_request_id
from tasks.job import Job, TaskRequest
from tasks.queueing.publisher import Publisher

MAX_ERRORS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that is recorded and queued."""

    request_id: str
    agent: str
    sensitivity: str
    provider: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Takes requests in. `context_window` is the model's, in tokens."""

    database: Database
    governance: GovernanceInterceptor
    profiles: Profiles
    publisher: Publisher
    keys: KeyWrapper
    context_window: int

    def submit(self, caller: Caller, body: bytes) -> Accepted:
        """Take one task in. Raises GatewayError with the request's id in it, once the refusal is recorded."""
        request_id = new_request_id()
        decided: Mapping[str, Any] = {}
        try:
            task = parse(body)
            decision = self.governance.decide(task)
            decided = decision.columns
            decision.enforce()
            job, wrapped_key = self._admit(caller, request_id, task, decided)
        except DatabaseUnavailable as error:
            # Nothing can be recorded, so nothing is taken; the caller is told to come back.
            error.request_id = request_id
            raise
        except GatewayError as refusal:
            self.refuse(caller, refusal, request_id, decided)
            raise
        self._publish(caller, job, wrapped_key)
        return Accepted(request_id, task.agent, decided["sensitivity"], decided["provider"], job.prompt.token_count)

    def refuse(
        self,
        caller: Caller,
        refusal: GatewayError,
        request_id: str | None = None,
        decided: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that the caller's request is answered with `refusal`. Raises DatabaseUnavailable if it cannot be."""
        refusal.request_id = request_id = request_id or new_request_id()
        facts = dict(decided or {})
        subject = Subject(request_id, caller.organization, caller.key_id, facts.pop("agent_name", None))
        vetoed = isinstance(refusal, PolicyVeto)
        if vetoed:
            facts["details"] = {"veto": refusal.extensions["veto"]}
        self.database.write(
            lambda connection: lifecycle.refuse(
                connection, subject, "vetoed" if vetoed else "failed", refusal.code, facts
            )
        )

    def _admit(
        self, caller: Caller, request_id: str, task: TaskRequest, decided: Mapping[str, Any]
    ) -> tuple[Job, bytes]:
        """Assemble the prompt and commit the request with its events."""
        active = self.profiles.get(caller.organization, task.agent)
        prompt, sampling = assemble(task, active, self.context_window)
        # Asked before the commit, so that a queue that is away usually costs no admitted request.
        self.publisher.check()
        data_key, wrapped_key = self.keys.new_key(request_id)
        payload = task.model_copy(update={"sampling": sampling}).model_dump_json().encode()
        columns = {name: value for name, value in decided.items() if name != "agent_name"}
        admission = lifecycle.Admission(
            subject=Subject(request_id, caller.organization, caller.key_id, task.agent),
            decision={**columns, "profile_version": active.profile.version, "prompt_tokens": prompt.token_count},
            static_profile_hash=prompt.static_profile_hash,
            data_key=wrapped_key,
            payload=seal(data_key, payload, f"payload:{request_id}"),
        )
        self.database.write(lambda connection: lifecycle.admit(connection, admission))
        job = Job(
            request_id=request_id,
            epoch=lifecycle.FIRST_EPOCH,
            organization=caller.organization,
            prompt=prompt,
            sampling=sampling,
            published_at=time.time(),
            data_key=data_key,
        )
        return job, wrapped_key

    def _publish(self, caller: Caller, job: Job, wrapped_key: bytes) -> None:
        try:
            self.publisher.publish(job, wrapped_key)
        except QueueUnavailable as error:
            code, error.request_id = error.code, job.request_id
            # The message may have arrived although the answer did not: a worker will see the request as failed.
            subject = Subject(job.request_id, caller.organization, caller.key_id)
            attempt = lifecycle.Attempt(subject, job.epoch, 0)
            self.database.write(lambda connection: lifecycle.finish(connection, attempt, "failed", code=code))
            raise


def parse(body: bytes) -> TaskRequest:
    """Read a task from a request's body. Raises InvalidJson or InvalidRequest; neither repeats what was sent."""
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidJson(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        return TaskRequest.model_validate(content)
    except ValidationError as error:
        problems = [
            {"field": ".".join(map(str, item["loc"])) or "body", "message": item["msg"]}
            for item in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        fields = ", ".join(dict.fromkeys(problem["field"] for problem in problems[:MAX_ERRORS_SHOWN]))
        raise InvalidRequest(f"the request is not valid: {fields}", errors=problems[:MAX_ERRORS_SHOWN]) from None
