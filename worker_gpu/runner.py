"""One request, from a queue message to its terminal event.

    decode → start (SQL) → static ids → engine → frames … → complete (SQL) → last frame → drop the lease

The order of the last three is the promise: the answer is recorded before anyone is told that it is complete, and the
message is let go last. A worker may die between any two of them; the message then comes back when its lease ends,
`start` finds the request finished, and only the steps that are missing are done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy.engine import Connection

from tasks import lifecycle
from tasks.crypto import derive, seal
from tasks.db import Database
from tasks.errors import DatabaseUnavailable, EngineDead, GatewayError, MessageRejected
from tasks.job import Job, Result, Timings, Usage
from tasks.lifecycle import Attempt, NotStarted
from tasks.queueing.leases import Leases
from tasks.queueing.message import MessageCodec
from tasks.schema import TERMINAL_STATES
from tasks.stream import completed, ended
from worker_gpu.engines.base import Engine, GenerationRequest
from worker_gpu.profiles import StaticParts
from worker_gpu.streams import RequestStream, StreamWriter

logger = logging.getLogger(__name__)
T = TypeVar("T")
_DATABASE_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs requests. `salt` is the secret that organizations' cache salts are derived from."""

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

    async def run(self, envelope: Any, tag: str) -> bool:
        """Run the job of one message. Returns whether it was answered. Raises EngineDead; the message stays leased."""
        taken_at = time.time()
        try:
            job = self.codec.decode(envelope)
        except MessageRejected as error:
            # Left leased: perhaps another worker has the key that this one lacks, and it is tried again then.
            logger.error("message %s refused: %s", tag, error.detail)
            return False
        started = await self._write(
            lambda connection: lifecycle.start(connection, job.request_id, job.epoch, self.worker, self.max_attempts)
        )
        if isinstance(started, NotStarted):
            await self._tell_again(job, started)
            await self.leases.drop(tag)
            return False
        stream = self.streams.open(job.request_id, job.data_key, started.number)
        try:
            result = await self._generate(job, stream, taken_at)
        except EngineDead:
            raise
        except Exception as error:
            if not isinstance(error, GatewayError):
                # Its text may quote the prompt, so only its kind is logged.
                logger.error("request %s: unexpected %s", job.request_id, type(error).__name__)
            mine = await self._fail(started, stream, getattr(error, "code", GatewayError.code))
            succeeded = False
        else:
            mine = succeeded = await self._complete(job, started, stream, result)
        if mine:
            await self.leases.drop(tag)
        else:
            # Another attempt has taken over, under the same lease: it is no longer ours to drop.
            logger.warning("request %s: attempt %d was fenced off", job.request_id, started.number)
        return succeeded

    async def _generate(self, job: Job, stream: RequestStream, taken_at: float) -> Result:
        static = await self.static_parts.token_ids(job.prompt.static_profile_hash)
        request = GenerationRequest(
            request_id=f"{job.request_id}-{stream.attempt}",
            prompt_token_ids=[*static, *job.prompt.dynamic_token_ids],
            sampling=job.sampling,
            cache_salt=derive(self.salt, "cache-salt", job.organization).hex(),
        )
        first_token_at: float | None = None
        last = None
        async with aclosing(self.engine.generate(request)) as deltas:
            async for delta in deltas:
                if first_token_at is None and delta.output_tokens:
                    first_token_at = time.time()
                stream.write(delta.text)
                last = delta
        if last is None or last.finish_reason is None:
            raise GatewayError("the engine ended the request without saying why")
        stream.cut()
        return Result(
            text=stream.text,
            cuts=tuple(stream.cuts),
            finish_reason=last.finish_reason,
            model=self.model,
            usage=Usage(
                prompt_tokens=len(request.prompt_token_ids),
                cached_tokens=last.cached_tokens,
                output_tokens=last.output_tokens,
            ),
            timings=Timings(
                queued_ms=_milliseconds(job.published_at, taken_at),
                prefill_ms=None if last.prefill_s is None else round(last.prefill_s * 1000, 3),
                first_token_ms=None if first_token_at is None else _milliseconds(job.published_at, first_token_at),
                total_ms=_milliseconds(job.published_at, time.time()),
            ),
        )

    async def _complete(self, job: Job, attempt: Attempt, stream: RequestStream, result: Result) -> bool:
        sealed = seal(job.data_key, result.model_dump_json().encode(), f"result:{job.request_id}")
        won = await self._write(lambda connection: lifecycle.complete(connection, attempt, result, sealed))
        if won:
            await stream.end(completed(stream.next_cursor, result))
        return won

    async def _fail(self, attempt: Attempt, stream: RequestStream, code: str) -> bool:
        stream.cut()
        won = await self._write(lambda connection: lifecycle.finish(connection, attempt, "failed", code=code))
        if won:
            await stream.end(ended(attempt.number, "failed", code))
        return won

    async def _tell_again(self, job: Job, outcome: NotStarted) -> None:
        """Send the last frame of a request that ended without it; a watcher otherwise learns of it from SQL."""
        if outcome.state == "failed":
            stream = self.streams.reopen(job.request_id, job.data_key, outcome.attempt)
            await stream.end(ended(outcome.attempt, outcome.state, outcome.code))
        elif outcome.state not in TERMINAL_STATES:
            logger.info("request %s: message of epoch %d leads nowhere", job.request_id, job.epoch)

    async def _write(self, work: Callable[[Connection], T]) -> T:
        """Commit `work`, however long the database is away: what was done must be recorded."""
        while True:
            try:
                return await asyncio.wrap_future(self.database.submit(work))
            except DatabaseUnavailable:
                await asyncio.sleep(_DATABASE_RETRY_S)


def _milliseconds(start: float, end: float) -> float:
    """Return the time between two instants in seconds; clocks of two hosts may differ by a little."""
    return round(max(0.0, end - start) * 1000, 3)
