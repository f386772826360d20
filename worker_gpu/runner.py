"""One request, from a queue message to what becomes of it.

    decode → governance, again → start (SQL) → static ids → engine → frames … → complete (SQL) → last frame → drop the lease

The order of the last three is the promise: the answer is recorded before anyone is told that it is complete, and the
message is let go last. A worker may die between any two of them; the message then comes back when its lease ends,
`start` finds the request finished, and only the steps that are missing are done.

What was allowed when it was queued may be so no longer: governance is asked once more before the engine sees it, and a
request that it refuses now ends here. If it refuses only because MetaQore does not answer, the message goes back into the
queue for a while.

A request that is cancelled, or whose deadline passes, while it runs is stopped at once: the engine's slot is free again,
and what was said so far is recorded with its figures. An attempt that ends without an answer is given back (see
`worker_gpu.giving_back`). Each run that still holds its message does exactly one thing with it at the end: drop it,
give it back, refuse it, or leave it to whoever has taken over.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from tasks import lifecycle
from tasks.crypto import DecryptionFailed, derive, seal, unseal
from tasks.errors import EngineDead, EngineFailed, GatewayError, MessageRejected
from tasks.job import Job, Result
from tasks.lifecycle import Attempt, NotStarted, Refusal
from tasks.queueing.message import MessageCodec, delivery_tag
from tasks.schema import TERMINAL_STATES
from tasks.stream import completed, ended
from worker_gpu.answer import Answer
from worker_gpu.engines.base import Engine, GenerationRequest
from worker_gpu.giving_back import Returns
from worker_gpu.patience import Patience, is_unanswered
from worker_gpu.profiles import StaticParts
from worker_gpu.records import Records, seconds_until
from worker_gpu.scopes import Scope, Scopes
from worker_gpu.streams import StreamWriter

Outcome = Literal["completed", "cancelled", "expired"]
logger = logging.getLogger(__name__)
#: So long after a deadline the clock is past it for sure.
_JUST_AFTER_S = 0.02


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs requests. `salt` is the secret that organizations' cache salts are derived from.

    `recheck` returns why a request must not run any more; it blocks, and may raise DatabaseUnavailable.
    `scopes` holds what is being run, by request. Whoever has a last attempt holds `last_attempts`: requests that were
    running when their worker died come back together, and one of them may be what kills each worker that takes it. The
    others must not share their last attempt with it.
    """

    engine: Engine
    records: Records
    codec: MessageCodec
    static_parts: StaticParts
    streams: StreamWriter
    returns: Returns
    worker: str
    model: str
    max_attempts: int
    salt: bytes
    recheck: Callable[[str], Refusal | None]
    patience: Patience
    scopes: Scopes = field(default_factory=Scopes)
    last_attempts: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, envelope: Any, tag: str, came_back: int = 0) -> bool:
        """Run the job of one message, which was given back `came_back` times before. Returns whether it was answered.

        Raises EngineDead once the attempt has been given back.
        """
        try:
            job = self.codec.decode(envelope)
            if tag != delivery_tag(job.request_id, job.epoch):
                raise MessageRejected("the message bears another's name")
        except MessageRejected as error:
            self.returns.refuse(tag, came_back, error)
            return False
        with self.scopes.open(tag, job.request_id, job.epoch) as scope:
            async with AsyncExitStack() as turn:
                if came_back or job.epoch > lifecycle.FIRST_EPOCH:
                    await self._wait_for_turn(scope, turn)
                return await self._run(job, scope)

    async def _wait_for_turn(self, scope: Scope, turn: AsyncExitStack) -> None:
        """Wait until no other request has its last attempt here, if this one is about to have it."""
        async with scope.bounds():
            left = await self.records.attempts_left(scope.request_id, self.max_attempts)
            if left == 1 < self.max_attempts:
                time_left_s = await self.records.time_left_s(scope.request_id)
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if time_left_s == math.inf else time_left_s):
                        await turn.enter_async_context(self.last_attempts)

    async def _run(self, job: Job, scope: Scope) -> bool:
        taken_at = time.time()
        refusal: Refusal | None = None
        async with scope.bounds():
            refusal = await self.records.in_thread(lambda: self.recheck(job.request_id))
            if is_unanswered(refusal) and (pause_s := await self._patience_s(job.request_id)) is not None:
                logger.info("request %s waits for MetaQore", job.request_id)
                self.returns.later(scope, pause_s)
                return False
        if scope.reason not in (None, "cancelled"):
            self.returns.unbegun(scope)
            return False
        scope.begun = True
        started = await self.records.write(
            lambda on: lifecycle.start(on, job.request_id, job.epoch, self.worker, self.max_attempts, refusal)
        )
        if isinstance(started, NotStarted):
            await self._tell_again(job, started)
            self.returns.drop(scope)
            return False
        answer = Answer(job, self.streams.open(job.request_id, job.data_key, started.number), self.model, taken_at)
        return await self._attempt(job, started, answer, scope)

    async def _patience_s(self, request_id: str) -> float | None:
        """Return how long to wait before MetaQore is asked again, or None if there is no use in that."""
        left_s = await self.records.time_left_s(request_id)
        pause_s = await self.patience.pause_s(request_id) if left_s else None
        return None if pause_s is None else min(pause_s, left_s + _JUST_AFTER_S)

    async def _attempt(self, job: Job, attempt: Attempt, answer: Answer, scope: Scope) -> bool:
        """See it through to what becomes of it; return whether it was answered."""
        try:
            if scope.reason is None:
                async with scope.bounds(seconds_until(attempt.deadline)):
                    await self._generate(job, attempt, answer)
            else:
                # While it was being recorded as begun.
                scope.interrupted = True
        except EngineDead:
            await self.returns.attempt(scope, attempt, answer.stream, EngineDead.code)
            raise
        except GatewayError as error:
            if error.retryable:
                await self.returns.attempt(scope, attempt, answer.stream, error.code)
            else:
                await self._fail(scope, attempt, answer, error.code)
        except Exception as error:
            # Its text may quote the prompt, so only its kind is logged.
            logger.error("request %s: unexpected %s", job.request_id, type(error).__name__)
            await self.returns.attempt(scope, attempt, answer.stream, GatewayError.code)
        else:
            if not scope.interrupted:
                return await self._record(job, scope, attempt, answer, "completed")
            if scope.reason in (None, "cancelled"):
                await self._record(job, scope, attempt, answer, "expired" if scope.reason is None else "cancelled")
            else:
                await self.returns.stopped(scope, attempt, answer.stream)
        return False

    async def _generate(self, job: Job, attempt: Attempt, answer: Answer) -> None:
        """Have the engine answer. Raises what `Engine.generate` does, EngineFailed if it does not say how it ended."""
        static = await self.records.when_there(lambda: self.static_parts.token_ids(job.prompt.static_profile_hash))
        request = generation_request(job, attempt.number, static, self.salt)
        async with aclosing(self.engine.generate(request)) as deltas:
            async for delta in deltas:
                answer.add(delta)
        if len(answer.finish_reasons) < job.sampling.n:
            raise EngineFailed("the engine ended the request without saying why")

    async def _record(self, job: Job, scope: Scope, attempt: Attempt, answer: Answer, state: Outcome) -> bool:
        """Record what was said; return whether it was all, and this attempt's to say."""
        result = answer.result(state)
        sealed = seal(job.data_key, result.model_dump_json(exclude_defaults=True).encode(), f"result:{job.request_id}")
        if not await self.records.write(lambda on: lifecycle.answer(on, attempt, result, sealed, state)):
            self.returns.fenced(scope, attempt)
            return False
        if state == "completed":
            await answer.stream.end(completed(answer.stream.next_cursor, result))
        else:
            await answer.stream.end(ended(attempt.number, state, state))
        self.returns.drop(scope)
        return state == "completed"

    async def _fail(self, scope: Scope, attempt: Attempt, answer: Answer, code: str) -> None:
        """End a request that no other attempt could answer either."""
        answer.stream.cut()
        if await self.records.write(lambda on: lifecycle.finish(on, attempt, "failed", code=code)):
            await answer.stream.end(ended(attempt.number, "failed", code))
            self.returns.drop(scope)
        else:
            self.returns.fenced(scope, attempt)

    async def _tell_again(self, job: Job, outcome: NotStarted) -> None:
        """Send what the stream of a request that has ended may lack; a watcher otherwise learns of it from SQL, later."""
        if outcome.state is None or outcome.state not in TERMINAL_STATES:
            logger.info("request %s: message of epoch %d leads nowhere", job.request_id, job.epoch)
            return
        sealed = await self.records.result(job.request_id) if outcome.answered else None
        if sealed is None:
            stream = self.streams.reopen(job.request_id, job.data_key, outcome.attempt)
            await stream.end(ended(outcome.attempt, outcome.state, outcome.code))
            return
        try:
            result = Result.model_validate_json(unseal(job.data_key, sealed, f"result:{job.request_id}"))
        except (DecryptionFailed, ValidationError):
            logger.error("request %s: what is stored of its answer cannot be read", job.request_id)
            return
        stream = self.streams.restore(job.request_id, job.data_key, outcome.attempt, result.pieces)
        if outcome.state == "completed":
            await stream.end(completed(stream.next_cursor, result))
        else:
            await stream.end(ended(outcome.attempt, outcome.state, outcome.code))


def generation_request(job: Job, attempt: int, static: Sequence[int], salt: bytes) -> GenerationRequest:
    """Return what the engine is asked for a job's so-many-th attempt; `static` are the token ids of its profile."""
    return GenerationRequest(
        request_id=f"{job.request_id}-{attempt}",
        prompt_token_ids=[*static, *job.prompt.dynamic_token_ids],
        sampling=job.sampling,
        cache_salt=derive(salt, "cache-salt", job.organization).hex(),
        tools=job.tools,
    )
