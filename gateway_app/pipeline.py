"""A request's way in, from HTTP body to queue. Read this first.

    authenticate → read → decide (governance) → assemble (token ids) → admit (one commit) → publish

Nothing is queued before its audit events are durable, and every authenticated request leaves events, refused ones
too: a refusal is recorded, then answered. If the queue cannot take an admitted request, it is recorded as failed and
answered with 503, so that no client is told "accepted" for work that nobody will do.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.assembly import assemble
from gateway_app.governance.api_keys import Caller
from gateway_app.governance.interceptor import GovernanceInterceptor
from gateway_app.profiles import Profiles
from tasks import lifecycle
from tasks.audit.events import Subject
from tasks.crypto import KeyWrapper, seal
from tasks.db import Database, now
from tasks.errors import DatabaseUnavailable, DeadlinePassed, GatewayError, PolicyVeto, QueueFull, QueueUnavailable
from tasks.idempotency import Idempotency, earlier_use, forget
from tasks.ids import new_request_id
from tasks.job import Job, TaskRequest
from tasks.queueing.publisher import Publisher


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that is recorded and queued. `repeated` tells that it is an earlier one, by its idempotency key."""

    request_id: str
    task: TaskRequest
    sensitivity: str
    provider: str
    prompt_tokens: int
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Takes requests in. `context_window` is the model's, in tokens; `idempotency_secret` keys the hashes of keys."""

    database: Database
    governance: GovernanceInterceptor
    profiles: Profiles
    publisher: Publisher
    keys: KeyWrapper
    context_window: int
    model_name: str
    idempotency_secret: bytes = field(repr=False)

    def submit(
        self,
        caller: Caller,
        read: Callable[[], TaskRequest],
        idempotency: Idempotency | None = None,
        request_id: str | None = None,
    ) -> Accepted:
        """Take one request in, which `read` returns. Raises GatewayError once the refusal is recorded, its id in it.

        `request_id` is for callers that had to know the id beforehand.
        """
        request_id = request_id or new_request_id()
        decided: Mapping[str, Any] = {}
        try:
            task = read()
            decision = self.governance.decide(caller.organization, task, task.agent or self.model_name)
            decided = decision.columns
            decision.enforce()
            job, wrapped_key, holder = self._admit(caller, request_id, task, decided, idempotency)
        except DatabaseUnavailable as error:
            # Nothing can be recorded, so nothing is taken; the caller is told to come back.
            error.request_id = request_id
            raise
        except GatewayError as refusal:
            self.refuse(caller, refusal, request_id, decided)
            raise
        repeated = holder != request_id
        if not repeated:
            self._publish(caller, job, wrapped_key)
        return Accepted(
            holder, task, decided["sensitivity"], decided["provider"], job.prompt.token_count, repeated=repeated
        )

    def idempotency(self, key: str | None, body: bytes) -> Idempotency | None:
        """Return what is remembered of an Idempotency-Key and the body it came with."""
        if key is None:
            return None
        hashes = (hmac.digest(self.idempotency_secret, content, "sha256") for content in (key.encode(), body))
        return Idempotency(*hashes)

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
        kind: Literal["vetoed", "failed"] = "vetoed" if isinstance(refusal, PolicyVeto) else "failed"
        self.database.write(lambda connection: lifecycle.refuse(connection, subject, kind, refusal.code, facts))

    def _admit(
        self,
        caller: Caller,
        request_id: str,
        task: TaskRequest,
        decided: Mapping[str, Any],
        idempotency: Idempotency | None,
    ) -> tuple[Job, bytes, str]:
        """Assemble the prompt and commit the request with its events; return the id of the request that holds now."""
        profiles, organization = self.profiles, caller.organization
        active = profiles.get(organization, task.agent, request_id) if task.agent else None
        prompt, sampling = assemble(task, active, lambda: profiles.cold(organization), self.context_window)
        if idempotency is None or not self._used(organization, idempotency):
            if task.deadline is not None and task.deadline <= now():
                raise DeadlinePassed
            # Asked before the commit, so that a queue that is away usually costs no admitted request.
            self.publisher.check()
        data_key, wrapped_key = self.keys.new_key(request_id)
        payload = task.model_copy(update={"sampling": sampling}).model_dump_json(exclude_defaults=True).encode()
        columns = {name: value for name, value in decided.items() if name != "agent_name"}
        version = active.profile.version if active else None
        admission = lifecycle.Admission(
            subject=Subject(request_id, organization, caller.key_id, decided["agent_name"]),
            decision={**columns, "profile_version": version, "prompt_tokens": prompt.token_count},
            static_profile_hash=prompt.static_profile_hash,
            data_key=wrapped_key,
            payload=seal(data_key, payload, f"payload:{request_id}"),
            columns={"api": task.api, "priority": task.priority, "deadline": task.deadline},
            idempotency=idempotency,
        )
        try:
            holder = self.database.write(lambda connection: lifecycle.admit(connection, admission))
        except sa.exc.IntegrityError:
            # The same idempotency key was committed in the same moment; now it can be seen.
            if idempotency is None:
                raise
            holder = self.database.write(lambda connection: lifecycle.admit(connection, admission))
        job = Job(
            request_id=request_id,
            epoch=lifecycle.FIRST_EPOCH,
            organization=organization,
            prompt=prompt,
            sampling=sampling,
            published_at=time.time(),
            data_key=data_key,
            tools=task.tools,
            priority=task.priority,
        )
        return job, wrapped_key, holder

    def _used(self, organization: str, idempotency: Idempotency) -> bool:
        """Tell whether the request was taken already: then it needs no room in the queue, and was in time."""
        found = self.database.read(lambda connection: earlier_use(connection, organization, idempotency))
        return found is not None

    def _publish(self, caller: Caller, job: Job, wrapped_key: bytes) -> None:
        try:
            self.publisher.publish(job, wrapped_key)
        except (QueueUnavailable, QueueFull) as error:
            code, error.request_id = error.code, job.request_id
            # The message may have arrived although the answer did not: a worker will see the request as failed.
            subject = Subject(job.request_id, caller.organization, caller.key_id)
            attempt = lifecycle.Attempt(subject, job.epoch, 0)

            def fail(connection: Connection) -> None:
                lifecycle.finish(connection, attempt, "failed", code=code)
                forget(connection, job.request_id, caller.organization)

            self.database.write(fail)
            raise
