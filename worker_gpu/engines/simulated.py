"""A stand-in for load tests of everything around the engine. It runs no model, and what it says means nothing.

It imitates what the gateway can notice of vLLM: continuous batching, a paged KV cache with prefix caching, KV events,
and how long all that takes; docs/simulation.md says how, and what is left out. All of it happens in ContinuousBatch,
which benchmarks drive in virtual time. Here the same machine is driven in real time: a step is run at once, its
seconds are slept through, and then its tokens are handed out. Sleeping is never exact, so the next step begins when
the last one should have ended, not when the sleep did: delays do not add up.

Whoever shows a result must say that it was simulated.
"""

from __future__ import annotations

import asyncio
import math
from collections import abc
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from tasks.errors import EngineDead, EngineFailed
from tasks.logs import get_logger
from worker_gpu.engines.base import STALL_S, Delta, EngineLoad, GenerationRequest, TierRates
from worker_gpu.engines.block_hashes import block_hashes
from worker_gpu.engines.kv_events import Subscriber
from worker_gpu.engines.simulated_batch import ContinuousBatch
from worker_gpu.engines.simulated_faults import Broken, Faults
from worker_gpu.engines.simulated_options import SimulationOptions
from worker_gpu.engines.simulated_sequence import Sequence, Token

logger = get_logger(__name__)

#: A loop that was kept busy for longer than this makes the engine late for good, instead of hurrying afterwards.
MAX_LAG_S = 0.1
#: An engine that was made slow hangs only after the time of so many of its steps.
SLOWEST_STEPS = 4


@dataclass(slots=True, eq=False)
class _Reader:
    """Who reads a request's deltas; an error among them means that no more will come. The rest is known from the first."""

    sequences: list[Sequence]
    deltas: asyncio.Queue[Delta | EngineFailed] = field(default_factory=asyncio.Queue)
    output_tokens: int = 0
    cached_tokens: int = 0
    prefill_s: float | None = None


class SimulatedEngine:
    """Imitates an engine that serves `model`, a name the caller chooses; see SimulationOptions and Engine."""

    def __init__(self, model: str, options: SimulationOptions) -> None:
        """Take the options; no step runs before `start`."""
        self.model = model
        self._batch = ContinuousBatch(options)
        self.limits = self._batch.limits
        self.steps = 0
        self.stall_s = max(STALL_S, SLOWEST_STEPS * options.slowest_step_s)
        self._faults = Faults(options.faults)
        self._readers: dict[str, _Reader] = {}
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    def subscribe(self, subscriber: Subscriber) -> None:
        """Pass every KV event from now on to `subscriber`, on the engine's loop."""
        self._batch.events.subscribe(subscriber)

    def block_hashes(self, token_ids: abc.Sequence[int], cache_salt: str) -> list[bytes]:
        """Return the hashes of a prompt's full blocks."""
        return block_hashes(token_ids, cache_salt, self.limits.block_size)

    def tell_again(self) -> None:
        """Tell of all that the cache holds, as if it had just been stored."""
        self._batch.pool.tell_again()

    @property
    def load(self) -> EngineLoad:
        """Return what the batch has to do."""
        return self._batch.load

    @property
    def tier_rates(self) -> TierRates:
        """Return none: the simulation has no tier but its GPU."""
        return TierRates()

    @property
    def busy(self) -> bool:
        """Tell whether somebody waits for an answer."""
        return bool(self._readers)

    async def start(self) -> None:
        """Begin to run steps."""
        self._loop_task = asyncio.create_task(self._run_steps(), name="simulated-engine")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Run one request; see Engine.generate. A delta is one token of one choice."""
        await self.check_health()
        if request.request_id in self._readers:
            raise ValueError(f"request {request.request_id} is running")
        reader = self._readers[request.request_id] = _Reader(self._batch.add(request))
        self._faults.arrive(request)
        self._arrived.set()
        unfinished = request.sampling.n
        try:
            while unfinished:
                if isinstance(delta := await reader.deltas.get(), EngineFailed):
                    raise delta
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            del self._readers[request.request_id]
            self._batch.abort(request.request_id)
            self._faults.leave(request.request_id)

    async def check_health(self) -> None:
        """Raise EngineDead if no steps are run."""
        if self._loop_task is None or self._loop_task.done():
            raise EngineDead()

    async def stop(self) -> None:
        """Run no more steps; running requests raise EngineDead."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)

    async def _run_steps(self) -> None:
        clock = asyncio.get_running_loop().time
        now = clock()
        try:
            while True:
                if (due_at := self._batch.due_at()) > now:
                    await self._wait(due_at)
                    now = max(now, clock())
                now = max(now, clock() - MAX_LAG_S)
                step = self._batch.step(now)
                now += step.seconds
                await asyncio.sleep(max(0.0, now - clock()))
                self.steps += 1
                for token in step.tokens:
                    if self._strikes(token):
                        # It hangs: it lives, and takes no other step.
                        await asyncio.Event().wait()
                    self._hand_out(token)
        except Broken:
            raise
        except Exception:
            # Whatever it is, requests would wait for ever without steps; the worker must hear that the engine is dead.
            logger.exception("the simulated engine failed")
            raise
        finally:
            for reader in self._readers.values():
                reader.deltas.put_nowait(EngineDead())

    async def _wait(self, due_at: float) -> None:
        """Wait until then, or until a request arrives."""
        self._arrived.clear()
        alarm = None if due_at == math.inf else asyncio.get_running_loop().call_at(due_at, self._arrived.set)
        await self._arrived.wait()
        if alarm is not None:
            alarm.cancel()

    def _strikes(self, token: Token) -> bool:
        """Let a fault strike at a request's first token; tell whether the engine hangs from now on."""
        request_id = token.sequence.request.request_id
        what = None if token.position else self._faults.strike(request_id)
        if what == "fail":
            self._readers[request_id].deltas.put_nowait(EngineFailed("the simulation has it fail"))
        return what == "hang"

    def _hand_out(self, token: Token) -> None:
        sequence, position = token
        reader = self._readers.get(sequence.request.request_id)
        # Whoever aborted during the step wants nothing, and another request may have come by the same id.
        if reader is None or sequence not in reader.sequences:
            return
        if not reader.output_tokens and sequence.scheduled_at is not None and sequence.first_token_at is not None:
            reader.cached_tokens = sequence.cached_tokens
            reader.prefill_s = sequence.first_token_at - sequence.scheduled_at
        reader.output_tokens += 1
        alternatives = sequence.request.sampling.logprobs
        reader.deltas.put_nowait(
            Delta(
                text=sequence.answer.texts[position],
                output_tokens=reader.output_tokens,
                cached_tokens=reader.cached_tokens,
                prefill_s=reader.prefill_s,
                finish_reason=token.finish_reason,
                choice=sequence.choice,
                logprobs=() if alternatives is None else (sequence.answer.logprob(position, alternatives),),
            )
        )
