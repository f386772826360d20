"""Letting go of a message: what becomes of it where this worker does not run it, or not to its end.

First SQL, then Redis. An attempt that ended without an answer is recorded as such, and the row says what is next: another
attempt, after a pause that grows, or the end, if it was the last one. Only then is the message given back, so that whoever
takes it finds the row ready. A worker that dies between the two leaves a lease that ends by itself.

Attempts that end for the worker's sake, since it is stopped or has lost its lease, do not count against the request. Those
that the engine's death ends do: the request may be what killed it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from tasks import lifecycle
from tasks.backoff import delay_s
from tasks.errors import AttemptsExhausted, MessageRejected
from tasks.lifecycle import Attempt
from tasks.logs import get_logger
from tasks.metrics import worker as metrics
from tasks.queueing.leases import Leases
from tasks.settings import SchedulingGroup
from tasks.stream import ended
from worker_gpu import tracing
from worker_gpu.records import Records
from worker_gpu.request_stream import RequestStream
from worker_gpu.scopes import Scope

logger = get_logger(__name__)
#: A message that this worker cannot verify may be fit for another, which has a key that it lacks.
UNVERIFIED_PAUSE_S: Final = 5.0
UNVERIFIED_TIMES: Final = 3
#: The last frame's code, by what became of the request.
_CODES = {"dead": AttemptsExhausted.code, "cancelled": "cancelled", "expired": "expired"}


@dataclass(frozen=True, slots=True)
class Returns:
    """Lets go of messages. A run whose message this worker has taken again meanwhile lets go of nothing."""

    records: Records
    leases: Leases
    settings: SchedulingGroup

    def drop(self, scope: Scope) -> None:
        """Forget the message: its request has ended, or it is of an epoch that is past."""
        if scope.reason != "superseded":
            self.leases.drop(scope.tag)

    def later(self, scope: Scope, pause_s: float) -> None:
        """Give back a message that was not begun, to be looked at again after a pause."""
        if scope.reason != "superseded":
            self.leases.give_back(scope.tag, pause_s)

    def unbegun(self, scope: Scope) -> None:
        """Give back a message whose run was stopped before it began, or leave it to whom it belongs by now."""
        if scope.reason == "lease_lost":
            self.leases.release(scope.tag)
        elif scope.reason == "republished":
            self.drop(scope)
        else:
            self.later(scope, 0.0)

    def fenced(self, scope: Scope, attempt: Attempt) -> None:
        """Leave the message to the attempt that has taken over: it is no longer ours to drop."""
        metrics.FENCED.inc()
        logger.warning("an attempt was fenced off", request_id=scope.request_id, attempt=attempt.number)
        scope.outcome = "fenced"
        if scope.reason == "republished":
            self.drop(scope)
        elif scope.reason != "superseded":
            self.leases.release(scope.tag)

    def refuse(self, tag: str, came_back: int, error: MessageRejected) -> None:
        """Set aside a message that no gateway wrote as it is, once others have had a chance to read it."""
        logger.error("a message is refused", tag=tag, why=error.detail)
        if came_back + 1 < UNVERIFIED_TIMES:
            self.leases.give_back(tag, UNVERIFIED_PAUSE_S)
        else:
            self.leases.refuse(tag, error.detail)

    async def stopped(self, scope: Scope, attempt: Attempt, stream: RequestStream) -> None:
        """Let go of an attempt that was stopped for the reason that its scope names."""
        if scope.reason == "engine_dead":
            await self.attempt(scope, attempt, stream, scope.reason)
        elif scope.reason in ("superseded", "republished"):
            self.fenced(scope, attempt)
        else:
            await self._give_back(scope, attempt, stream, str(scope.reason), None, 0.0)

    async def attempt(self, scope: Scope, attempt: Attempt, stream: RequestStream, code: str) -> None:
        """Give back an attempt that failed with `code`: it is tried again after a pause, if there are attempts left."""
        pause_s = delay_s(
            attempt.number, random.random(), first_s=self.settings.retry_first_s, max_s=self.settings.retry_max_s
        )
        await self._give_back(scope, attempt, stream, code, self.settings.max_attempts, pause_s)

    async def _give_back(
        self,
        scope: Scope,
        attempt: Attempt,
        stream: RequestStream,
        code: str,
        max_attempts: int | None,
        pause_s: float,
    ) -> None:
        stream.cut()
        became = await self.records.write(
            lambda on: lifecycle.give_back(on, attempt, code, delay_s=pause_s, max_attempts=max_attempts)
        )
        logger.info("an attempt ended", request_id=scope.request_id, attempt=attempt.number, code=code, outcome=became)
        tracing.became(became, code, excused=max_attempts is None)
        scope.outcome = became
        if became == "fenced":
            self.fenced(scope, attempt)
        elif became == "queued":
            self.unbegun(scope) if scope.reason == "lease_lost" else self.later(scope, pause_s)
        else:
            await stream.end(ended(attempt.number, became, _CODES[became]))
            self.drop(scope)
