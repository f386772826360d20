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
import math
import time
from collections import Counter
from contextlib import AsyncExitStack, aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Literal, cast

from sqlalchemy.engine import Connection

from tasks import lifecycle
from tasks.crypto import seal
from tasks.errors import DatabaseUnavailable, EngineDead, EngineFailed, GatewayError, MessageRejected
from tasks.governance.recheck import Recheck
from tasks.job import Job
from tasks.lifecycle import Attempt, NotStarted, Refusal
from tasks.logs import bind_request, get_logger
from tasks.queueing.message import MessageCodec, delivery_tag
from tasks.schema import TERMINAL_STATES
from tasks.stream import completed, ended
from tasks.tracing import current, span
from worker_gpu import tracing
from worker_gpu.answer import Answer
from worker_gpu.asking import generation_request
from worker_gpu.cache import CacheIndex
from worker_gpu.delivery import Delivery
from worker_gpu.engines.base import Engine
from worker_gpu.freshness import Freshness
from worker_gpu.giving_back import Returns
from worker_gpu.hits import HitCounter
from worker_gpu.patience import Patience, is_unanswered
from worker_gpu.profiles import StaticParts
from worker_gpu.progress import Progress
from worker_gpu.records import RETRY_S, Records, seconds_until
from worker_gpu.scopes import Outcome, Scope, Scopes
from worker_gpu.streams import StreamWriter
from worker_gpu.telling_again import tell_again

Answered = Literal["completed", "cancelled", "expired"]
logger = get_logger(__name__)
#: So long after a deadline the clock is past it for sure.
_JUST_AFTER_S = 0.02


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs requests. `salt` is the secret that organizations' cache salts are derived from.

    `scopes` holds what is being run, by request. Whoever has a last attempt holds `last_attempts`: requests that were
    running when their worker died come back together, and one of them may be what kills each worker that takes it. The
    others must not share their last attempt with it. `served` are output tokens by organization, for the reporter to take.
    """

    engine: Engine
    engine_name: str
    records: Records
    codec: MessageCodec
    static_parts: StaticParts
    streams: StreamWriter
    returns: Returns
    worker: str
    model: str
    max_attempts: int
    salt: bytes
    recheck: Recheck
    patience: Patience
    cache: CacheIndex
    scopes: Scopes = field(default_factory=Scopes)
    last_attempts: asyncio.Lock = field(default_factory=asyncio.Lock)
    hits: HitCounter = field(default_factory=HitCounter)
    served: Counter[str] = field(default_factory=Counter)
    freshness: Freshness = field(default_factory=Freshness)

    async def run(self, delivery: Delivery, progress: Progress) -> Outcome:
        """Run the job of one message; `progress` is told how far it is. Returns what became of its request.

        Raises EngineDead once the attempt has been given back.
        """
        tag, came_back = delivery.tag, delivery.came_back
        try:
            job = self.codec.decode(delivery.envelope)
            if tag != delivery_tag(job.request_id, job.epoch):
                raise MessageRejected("the message bears another's name")
        except MessageRejected as error:
            self.returns.refuse(tag, came_back, error)
            return "failed"
        bind_request(job.request_id)
        with self.scopes.open(tag, job.request_id, job.epoch) as scope, tracing.attempt_span(job, tag):
            async with AsyncExitStack() as turn:
                if came_back or job.epoch > lifecycle.FIRST_EPOCH:
                    await self._wait_for_turn(scope, turn, progress)
                await self._run(job, scope, delivery, progress)
            return scope.outcome

    async def _wait_for_turn(self, scope: Scope, turn: AsyncExitStack, progress: Progress) -> None:
        """Wait until no other request has its last attempt here, if this one is about to have it."""
        async with scope.bounds():
            left = await self.records.attempts_left(scope.request_id, self.max_attempts)
            if left == 1 < self.max_attempts:
                time_left_s = await self.records.time_left_s(scope.request_id)
                with suppress(TimeoutError), progress.elsewhere():
                    async with asyncio.timeout(None if time_left_s == math.inf else time_left_s):
                        await turn.enter_async_context(self.last_attempts)

    async def _run(self, job: Job, scope: Scope, delivery: Delivery, progress: Progress) -> None:
        taken_at = time.time()
        refusal: Refusal | None = None
        if self.recheck.asks_projects:
            async with scope.bounds():
                with span("governance"):
                    refusal = await self.records.in_thread(lambda: self.recheck.refusal(job.request_id))
                if is_unanswered(refusal) and (pause_s := await self._patience_s(job.request_id)) is not None:
                    logger.info("a request waits for MetaQore", request_id=job.request_id)
                    self.returns.later(scope, pause_s)
                    return
        started = await self._start(job, scope, refusal, delivery)
        if started is None:
            self.returns.unbegun(scope)
            return
        if isinstance(started, NotStarted):
            tracing.became(started.state or "unknown", started.code)
            await tell_again(job, started, self.records, self.streams)
            self.returns.drop(scope)
            scope.outcome = cast("Outcome", started.state) if started.state in TERMINAL_STATES else "fenced"
            return
        tracing.begun(started, taken_at - job.published_at)
        if started.number > 1 and current().recording:
            await self._tell_of_lost(job, scope, started.number - 1)
        stream = self.streams.open(job.request_id, job.data_key, started.number)
        await self._attempt(job, started, Answer(job, stream, self.model, taken_at, progress.begin), scope)

    async def _start(
        self, job: Job, scope: Scope, refusal: Refusal | None, delivery: Delivery
    ) -> Attempt | NotStarted | None:
        """Begin the next attempt, unless governance refuses it now. Returns None if it was stopped before it could.

        A try is not interrupted, since it might have been committed. Waiting for a database that is away is.
        """
        details = None
        if delivery.decision is not None and delivery.decision.is_for(job.prompt.static_profile_hash, self.worker):
            details = {"schedule": delivery.decision.record()}

        def work(on: Connection) -> Attempt | NotStarted:
            why = refusal or self.recheck.by_record(on, job.request_id)
            return lifecycle.start(on, job.request_id, job.epoch, self.worker, self.max_attempts, why, details)

        while scope.reason in (None, "cancelled"):
            scope.begun = True
            try:
                return await self.records.try_write(work)
            except DatabaseUnavailable:
                scope.begun = False
            async with scope.bounds() if scope.reason is None else nullcontext():
                await asyncio.sleep(RETRY_S)
        return None

    async def _tell_of_lost(self, job: Job, scope: Scope, number: int) -> None:
        """Have the attempt before in the trace, if its worker never told how it ended."""
        began = await self.records.in_thread(lambda: self.records.lost_attempt(job.request_id, number))
        if began is not None:
            tracing.lost(job, scope.tag, number, began)

    async def _patience_s(self, request_id: str) -> float | None:
        """Return how long to wait before MetaQore is asked again, or None if there is no use in that."""
        left_s = await self.records.time_left_s(request_id)
        pause_s = await self.patience.pause_s(request_id) if left_s else None
        return None if pause_s is None else min(pause_s, left_s + _JUST_AFTER_S)

    async def _attempt(self, job: Job, attempt: Attempt, answer: Answer, scope: Scope) -> None:
        """See it through to what becomes of it."""
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
            logger.error("unexpected error in an attempt", request_id=job.request_id, error=type(error).__name__)
            await self.returns.attempt(scope, attempt, answer.stream, GatewayError.code)
        else:
            if not scope.interrupted:
                await self._record(job, scope, attempt, answer, "completed")
            elif scope.reason in (None, "cancelled"):
                await self._record(job, scope, attempt, answer, "expired" if scope.reason is None else "cancelled")
            else:
                await self.returns.stopped(scope, attempt, answer.stream)

    async def _generate(self, job: Job, attempt: Attempt, answer: Answer) -> None:
        """Have the engine answer. Raises what `Engine.generate` does, EngineFailed if it does not say how it ended."""
        static = await self.records.when_there(lambda: self.static_parts.get(job.prompt.static_profile_hash))
        request = generation_request(job, attempt.number, static.token_ids, self.salt)
        profile, size = job.prompt.static_profile_hash, len(static.token_ids)
        self.cache.register(profile, static.chain, size, static.token_ids, request.cache_salt)
        self.freshness.use(profile, static.token_ids, request.cache_salt, asyncio.get_running_loop().time())
        with tracing.engine_span(job, self.model, self.engine_name) as engine:
            asked_at = time.time()
            try:
                async with aclosing(self.engine.generate(request)) as deltas:
                    said = 0
                    async for delta in deltas:
                        answer.add(delta)
                        self.served[job.organization] += delta.output_tokens - said
                        said = delta.output_tokens
            finally:
                tracing.generated(engine, answer, self.model, asked_at)
                if answer.first_token_at is not None:
                    cached, block_size = answer.usage.cached_tokens, self.engine.limits.block_size
                    self.hits.note(job.prompt.static_profile_hash, static, cached, block_size)
        if len(answer.finish_reasons) < job.sampling.n:
            raise EngineFailed("the engine ended the request without saying why")

    async def _record(self, job: Job, scope: Scope, attempt: Attempt, answer: Answer, state: Answered) -> None:
        """Record what was said, if that is this attempt's to say."""
        result = answer.result(state)
        sealed = seal(job.data_key, result.model_dump_json(exclude_defaults=True).encode(), f"result:{job.request_id}")
        if not await self.records.write(lambda on: lifecycle.answer(on, attempt, result, sealed, state)):
            self.returns.fenced(scope, attempt)
            return
        tracing.became(state)
        scope.outcome = state
        if state == "completed":
            await answer.stream.end(completed(answer.stream.next_cursor, result))
        else:
            await answer.stream.end(ended(attempt.number, state, state))
        self.returns.drop(scope)

    async def _fail(self, scope: Scope, attempt: Attempt, answer: Answer, code: str) -> None:
        """End a request that no other attempt could answer either."""
        answer.stream.cut()
        if await self.records.write(lambda on: lifecycle.finish(on, attempt, "failed", code=code)):
            tracing.became("failed", code)
            scope.outcome = "failed"
            await answer.stream.end(ended(attempt.number, "failed", code))
            self.returns.drop(scope)
        else:
            self.returns.fenced(scope, attempt)
