"""A request's way in, from HTTP body to queue. Read this first.

    authenticate → read → decide (governance) → assemble (token ids) → ask for room → admit (one commit) → publish

Nothing is queued before its audit events are durable, and every authenticated request leaves events, refused ones
too: a refusal is recorded, then answered. Room in the queue is asked for before the commit, so that a queue that is full
or away refuses. From the commit on the request is accepted, whatever happens: if it cannot be published then, or this
process dies, the housekeeper publishes it (`gateway_app.housekeeping`).
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy.engine import Row

from gateway_app.admitting import commit
from gateway_app.assembly import assemble
from gateway_app.governance.api_keys import Caller
from gateway_app.governance.interceptor import GovernanceInterceptor
from gateway_app.profiles import Profiles
from gateway_app.turns import Turns
from tasks import lifecycle, tracing
from tasks.audit.events import Subject
from tasks.crypto import KeyWrapper, seal
from tasks.db import Database, now
from tasks.errors import DatabaseUnavailable, DeadlinePassed, GatewayError, PolicyVeto, QueueUnavailable
from tasks.idempotency import Idempotency, earlier_use
from tasks.ids import new_request_id
from tasks.job import Job, TaskRequest
from tasks.logs import bind_request, get_logger
from tasks.metrics import gateway as metrics
from tasks.queueing.message import MessageCodec, delivery_tag
from tasks.queueing.publisher import Publisher
from tasks.tracing.messaging import PUBLISH, publishing

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that is recorded, and is queued or will be. `row` is what was committed of it.

    `repeated` tells that it is an earlier one, by its idempotency key.
    """

    row: Row[Any]
    task: TaskRequest
    sensitivity: str
    provider: str
    prompt_tokens: int
    repeated: bool = False

    @property
    def request_id(self) -> str:
        """Return the id of the request."""
        return str(self.row.request_id)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Takes requests in. `context_window` is the model's, in tokens; `idempotency_secret` keys the hashes of keys."""

    database: Database
    governance: GovernanceInterceptor
    profiles: Profiles
    publisher: Publisher
    codec: MessageCodec
    keys: KeyWrapper
    context_window: int
    model_name: str
    idempotency_secret: bytes = field(repr=False)
    turns: Turns = field(default_factory=Turns)

    def submit(
        self,
        caller: Caller,
        read: Callable[[], TaskRequest],
        idempotency: Idempotency | None = None,
        request_id: str | None = None,
        retry_of: str | None = None,
    ) -> Accepted:
        """Take one request in, which `read` returns. Raises GatewayError once the refusal is recorded, its id in it.

        `request_id` is for callers that had to know the id beforehand. `retry_of` is the id of the request that this one
        repeats, for the record.
        """
        request_id = request_id or new_request_id()
        bind_request(request_id)
        decided: Mapping[str, Any] = {}
        try:
            task = read()
            with tracing.span("governance") as span:
                decision = self.governance.decide(caller.organization, task, task.agent or self.model_name)
                decided = decision.columns
                span.set({"metaqore.sensitivity": decided["sensitivity"]})
                decision.enforce()
            if retry_of is not None:
                decided = {**decided, "details": {**decided["details"], "retry_of": retry_of}}
            with self.turns.turn():
                prompt_tokens, row = self._admit(caller, request_id, task, decided, idempotency)
        except DatabaseUnavailable as error:
            # A refusal cannot be recorded either; the caller is told to come back.
            error.request_id = request_id
            raise
        except GatewayError as refusal:
            self.refuse(caller, refusal, request_id, decided)
            raise
        if (span := tracing.current()).recording:
            span.set({"metaqore.request.id": row.request_id, "metaqore.organization": caller.organization})
            if task.agent is not None:
                span.set({"gen_ai.agent.name": task.agent})
        repeated = row.request_id != request_id
        bind_request(row.request_id)
        return Accepted(row, task, decided["sensitivity"], decided["provider"], prompt_tokens, repeated=repeated)

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
        bind_request(request_id)
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
    ) -> tuple[int, Row[Any]]:
        """Assemble the prompt, commit the request with its events, and publish it.

        Returns the length of the prompt in tokens, and the row of the request that holds now.
        """
        profiles, organization = self.profiles, caller.organization
        active = profiles.get(organization, task.agent, request_id) if task.agent else None
        with tracing.span("assemble prompt") as span:
            prompt, sampling = assemble(task, active, lambda: profiles.cold(organization), self.context_window)
            span.set({"metaqore.prompt_tokens": prompt.token_count})
        if idempotency is None or not self._used(organization, idempotency):
            if task.deadline is not None and task.deadline <= now():
                raise DeadlinePassed
            self.publisher.room(organization, prompt.token_count)
        data_key, wrapped_key = self.keys.new_key(request_id)
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
        message = self.codec.sealed(job)
        payload = task.model_copy(update={"sampling": sampling}).model_dump_json(exclude_defaults=True).encode()
        columns = {name: value for name, value in decided.items() if name != "agent_name"}
        version = active.profile.version if active else None
        admission = lifecycle.Admission(
            subject=Subject(request_id, organization, caller.key_id, decided["agent_name"]),
            decision={**columns, "profile_version": version, "prompt_tokens": prompt.token_count},
            static_profile_hash=prompt.static_profile_hash,
            data_key=wrapped_key,
            payload=seal(data_key, payload, f"payload:{request_id}"),
            columns={
                "api": task.api,
                "priority": task.priority,
                "deadline": task.deadline,
                "trace_context": tracing.current().context,
            },
            idempotency=idempotency,
            message=message,
            prompt_tokens=prompt.token_count,
        )
        with tracing.span("commit"):
            row = commit(self.database, admission, decided["details"].get("retry_of"))
        if row.request_id == request_id:
            self._publish(job, wrapped_key, message)
        return prompt.token_count, row

    def _used(self, organization: str, idempotency: Idempotency) -> bool:
        """Tell whether the request was taken already: then it needs no room in the queue, and was in time."""
        found = self.database.read(lambda connection: earlier_use(connection, organization, idempotency))
        return found is not None

    def _publish(self, job: Job, wrapped_key: bytes, message: bytes) -> None:
        try:
            with tracing.span(PUBLISH, publishing(delivery_tag(job.request_id, job.epoch)), "producer"):
                self.publisher.publish(self.codec.encode(job, wrapped_key, message, tracing.current().context))
        except QueueUnavailable:
            metrics.UNPUBLISHED.inc()
            logger.warning("the queue went away; the housekeeper will publish this", request_id=job.request_id)
