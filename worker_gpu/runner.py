"""One request, from a queue message to its terminal event.

    decode → governance, again → start (SQL) → static ids → engine → frames … → complete (SQL) → last frame → drop the lease

The order of the last three is the promise: the answer is recorded before anyone is told that it is complete, and the
message is let go last. A worker may die between any two of them; the message then comes back when its lease ends,
`start` finds the request finished, and only the steps that are missing are done.

What was allowed when it was queued may be so no longer: governance is asked once more before the engine sees it, and a
request that it refuses now ends here. If it refuses only because MetaQore does not answer, it is asked again for a while.

A request that is cancelled, or whose deadline passes, while it runs is stopped at once: the engine's slot is free again,
and what was said so far is recorded with its figures.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeVar

from sqlalchemy.engine import Connection

from tasks import lifecycle
from tasks.crypto import derive, seal
from tasks.db import Database, now
from tasks.errors import DatabaseUnavailable, EngineDead, GatewayError, MessageRejected
from tasks.job import Job
from tasks.lifecycle import Attempt, NotStarted, Refusal
from tasks.queueing.leases import Leases
from tasks.queueing.message import MessageCodec
from tasks.schema import TERMINAL_STATES
from tasks.stream import completed, ended
from worker_gpu.answer import Answer
from worker_gpu.engines.base import Engine, GenerationRequest
from worker_gpu.patience import is_unanswered, look_again
from worker_gpu.profiles import StaticParts
from worker_gpu.streams import RequestStream, StreamWriter

Outcome = Literal["completed", "cancelled", "expired"]
logger = logging.getLogger(__name__)
T = TypeVar("T")
_DATABASE_RETRY_S = 1.0
#: So long after a deadline the clock is past it for sure.
_JUST_AFTER_S = 0.02


@dataclass(slots=True, eq=False)
class Scope:
    """What is done for a request here, with the time limit by which it is stopped, and why it was stopped before that."""

    limit: asyncio.Timeout
    cancelled: bool = False
    superseded: bool = False

    def stop(self, *, cancelled: bool) -> None:
        """End it now. Where its limit has been reached it is ending already, for the reason that came first."""
        if not self.limit.expired():
            self.cancelled, self.superseded = cancelled, not cancelled
            self.limit.reschedule(asyncio.get_running_loop().time())


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs requests. `salt` is the secret that organizations' cache salts are derived from.

    `recheck` returns why a request must not run any more; it blocks, and may raise DatabaseUnavailable. Where it cannot
    tell for want of MetaQore's answer, it is asked again for up to `patience_s`.
    `scopes` holds the newest attempt of each request that the engine runs, or that waits for an answer.
    """

    engine: Engine
    database: Database
    codec: MessageCodec
    static_parts: StaticParts
    streams: StreamWriter
    leases: Leases
    worker: str
    model: str
    max_attempts: int
    salt: bytes
    recheck: Callable[[str], Refusal | None]
    patience_s: float = 0.0
    scopes: dict[str, Scope] = field(default_factory=dict)

    async def run(self, envelope: Any, tag: str) -> bool:
        """Run the job of one message. Returns whether it was answered. Raises EngineDead; the message stays leased."""
        taken_at = time.time()
        try:
            job = self.codec.decode(envelope)
        except MessageRejected as error:
            # Left leased: perhaps another worker has the key that this one lacks, and it is tried again then.
            logger.error("message %s refused: %s", tag, error.detail)
            return False
        refusal = await self._look(job.request_id)
        if self.patience_s > 0 and is_unanswered(refusal):
            scope, refusal = await self._be_patient(job.request_id, refusal)
            if scope.superseded:
                # Its lease was lost meanwhile and taken again by this very worker, which goes on with it elsewhere.
                return False
            taken_at = time.time()
        started = await self._write(
            lambda connection: lifecycle.start(
                connection, job.request_id, job.epoch, self.worker, self.max_attempts, refusal
            )
        )
        if isinstance(started, NotStarted):
            await self._tell_again(job, started)
            await self.leases.drop(tag)
            return False
        answer = Answer(job, self.streams.open(job.request_id, job.data_key, started.number), self.model, taken_at)
        try:
            state = await self._generate(job, started, answer)
        except EngineDead:
            raise
        except Exception as error:
            if not isinstance(error, GatewayError):
                # Its text may quote the prompt, so only its kind is logged.
                logger.error("request %s: unexpected %s", job.request_id, type(error).__name__)
            mine = await self._fail(started, answer.stream, getattr(error, "code", GatewayError.code))
            succeeded = False
        else:
            mine = await self._record(job, started, answer, state)
            succeeded = mine and state == "completed"
        if mine:
            await self.leases.drop(tag)
        else:
            # Another attempt has taken over, under the same lease: it is no longer ours to drop.
            logger.warning("request %s: attempt %d was fenced off", job.request_id, started.number)
        return succeeded

    def stop(self, request_id: str) -> None:
        """Stop a request that was cancelled, if it runs here."""
        scope = self.scopes.get(request_id)
        if scope is not None:
            scope.stop(cancelled=True)

    async def _look(self, request_id: str) -> Refusal | None:
        return await self._waiting(lambda: asyncio.to_thread(self.recheck, request_id))

    async def _be_patient(self, request_id: str, refusal: Refusal | None) -> tuple[Scope, Refusal | None]:
        """Look again until there is an answer, the deadline has passed, or nobody wants it any more; return the last word.

        `start` finds out which it was.
        """
        deadline = await self._waiting(
            lambda: asyncio.to_thread(self.database.read, lambda on: lifecycle.deadline(on, request_id))
        )
        left_s = _seconds_until(deadline)
        logger.info("request %s waits for MetaQore", request_id)
        async with self._scope(request_id, None if left_s is None else left_s + _JUST_AFTER_S) as scope:
            refusal = await look_again(lambda: self._look(request_id), refusal, self.patience_s)
        return scope, refusal

    async def _generate(self, job: Job, attempt: Attempt, answer: Answer) -> Outcome:
        """Have the engine answer; return whether it came to its end, was cancelled, or was not in time."""
        async with self._scope(job.request_id, _seconds_until(attempt.deadline)) as scope:
            await self._answer(job, attempt, answer)
        if scope.limit.expired():
            return "cancelled" if scope.cancelled else "expired"
        if len(answer.finish_reasons) < job.sampling.n:
            raise GatewayError("the engine ended the request without saying why")
        return "completed"

    @asynccontextmanager
    async def _scope(self, request_id: str, limit_s: float | None) -> AsyncIterator[Scope]:
        """Bound what is done within by so many seconds and by `stop`; being stopped is no error."""
        limit = asyncio.timeout(limit_s)
        scope = Scope(limit)
        try:
            async with limit:
                if (older := self.scopes.get(request_id)) is not None:
                    # Its lease was lost and taken again by this very worker. It is fenced off, so nobody wants it.
                    older.stop(cancelled=False)
                self.scopes[request_id] = scope
                try:
                    yield scope
                finally:
                    if self.scopes.get(request_id) is scope:
                        del self.scopes[request_id]
        except TimeoutError:
            if not limit.expired():
                # The engine's own.
                raise

    async def _answer(self, job: Job, attempt: Attempt, answer: Answer) -> None:
        static = await self.static_parts.token_ids(job.prompt.static_profile_hash)
        request = GenerationRequest(
            request_id=f"{job.request_id}-{attempt.number}",
            prompt_token_ids=[*static, *job.prompt.dynamic_token_ids],
            sampling=job.sampling,
            cache_salt=derive(self.salt, "cache-salt", job.organization).hex(),
            tools=job.tools,
        )
        async with aclosing(self.engine.generate(request)) as deltas:
            async for delta in deltas:
                answer.add(delta)

    async def _record(self, job: Job, attempt: Attempt, answer: Answer, state: Outcome) -> bool:
        result = answer.result(state)
        sealed = seal(job.data_key, result.model_dump_json(exclude_defaults=True).encode(), f"result:{job.request_id}")
        won = await self._write(lambda connection: lifecycle.answer(connection, attempt, result, sealed, state))
        if won and state == "completed":
            await answer.stream.end(completed(answer.stream.next_cursor, result))
        elif won:
            await answer.stream.end(ended(attempt.number, state, state))
        return won

    async def _fail(self, attempt: Attempt, stream: RequestStream, code: str) -> bool:
        stream.cut()
        won = await self._write(lambda connection: lifecycle.finish(connection, attempt, "failed", code=code))
        if won:
            await stream.end(ended(attempt.number, "failed", code))
        return won

    async def _tell_again(self, job: Job, outcome: NotStarted) -> None:
        """Send the last frame of a request that ended without it; a watcher otherwise learns of it from SQL."""
        if outcome.state in TERMINAL_STATES and not outcome.answered:
            stream = self.streams.reopen(job.request_id, job.data_key, outcome.attempt)
            await stream.end(ended(outcome.attempt, outcome.state, outcome.code))
        elif outcome.state not in TERMINAL_STATES:
            logger.info("request %s: message of epoch %d leads nowhere", job.request_id, job.epoch)

    async def _write(self, work: Callable[[Connection], T]) -> T:
        """Commit `work`, however long the database is away: what was done must be recorded."""
        return await self._waiting(lambda: asyncio.wrap_future(self.database.submit(work)))

    async def _waiting(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return what `work` gives, once the database is there."""
        while True:
            try:
                return await work()
            except DatabaseUnavailable:
                await asyncio.sleep(_DATABASE_RETRY_S)


def _seconds_until(deadline: datetime | None) -> float | None:
    return None if deadline is None else max(0.0, (deadline - now()).total_seconds())
