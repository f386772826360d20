"""A stand-in for load tests of everything around the engine. It runs no model, and what it says means nothing.

It imitates what the gateway can notice of vLLM: continuous batching, a prefix cache, and how long both take. One
loop runs steps. A step admits waiting requests while there are free slots, shares its token budget among the prompts
still to be computed, and gives each request whose prompt is done its next token:

    step time = STEP_S + STEP_S_PER_SEQUENCE * running + prompt tokens computed / PREFILL_TOKENS_PER_S

The prefix cache knows whole blocks by a hash over the cache salt and all tokens up to the block's end. Unlike vLLM's,
it does not keep output tokens, and may forget blocks in use. The text is a pure function of the prompt's token ids
and the seed, so that a retry gives the same text. Whoever shows a result must say that it was simulated.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from tasks.errors import EngineDead, PromptTooLong
from tasks.job import FinishReason, Sampling
from worker_gpu.engines.base import Delta, EngineLimits, GenerationRequest

# An 8B model in bfloat16 on one H100, as published for vLLM: prompts at some 25,000 tokens/s; decoding bound by
# reading 16 GB of weights at 3.35 TB/s, 5 ms a step, and a little more for each sequence's KV cache.
PREFILL_TOKENS_PER_S = 25_000.0
STEP_S = 0.005
STEP_S_PER_SEQUENCE = 0.000_03

SHORTEST_TOKENS, LONGEST_TOKENS = 24, 320  # Answers end by themselves at a length between these.
PHRASE = "the queue holds each request until one worker takes it and streams its answer back in order ."
WORDS = PHRASE.split()


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request in the engine. `to_compute` counts prompt tokens, `said` the pieces already delivered."""

    blocks: list[bytes]
    to_compute: int
    pieces: list[str]
    finish_reason: FinishReason
    cached_tokens: int = 0
    scheduled_at: float = 0.0
    prefill_s: float | None = None
    said: int = 0
    deltas: asyncio.Queue[Delta | None] = field(default_factory=asyncio.Queue)


class PrefixCache:
    """Block hashes, the least recently used first; holds at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        """Begin empty; a capacity of 0 keeps nothing."""
        self._capacity = capacity
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def match(self, blocks: list[bytes]) -> int:
        """Return how many leading blocks are known, and count them as used."""
        known = next((index for index, block in enumerate(blocks) if block not in self._blocks), len(blocks))
        self.add(blocks[:known])
        return known

    def add(self, blocks: list[bytes]) -> None:
        """Remember blocks. A chain's end counts as older than its beginning, which more prompts share."""
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)


class SimulatedEngine:
    """Imitates an engine that serves `model`, a name the caller chooses.

    `time_scale` stretches the time steps take: 1 is real time, 0 as fast as possible. `cache_blocks` 0 turns the
    prefix cache off. Of the sampling parameters, only max_tokens and seed change anything.
    """

    def __init__(
        self,
        model: str,
        *,
        max_num_seqs: int = 64,
        max_model_len: int = 8192,
        max_batch_tokens: int = 8192,
        block_size: int = 16,
        cache_blocks: int = 16_384,
        time_scale: float = 1.0,
    ) -> None:
        """Take the limits, in sequences, tokens and blocks; no step runs before `start`."""
        self.model = model
        self.limits = EngineLimits(max_model_len, max_num_seqs, block_size)
        self._max_batch_tokens = max_batch_tokens
        self._time_scale = time_scale
        self._cache = PrefixCache(cache_blocks)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to run steps."""
        self._loop_task = asyncio.create_task(self._run_steps(), name="simulated-engine")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Run one request; see Engine.generate. Raises PromptTooLong if no token could be added to the prompt."""
        await self.check_health()
        prompt = request.prompt_token_ids
        if len(prompt) >= self.limits.max_model_len:
            raise PromptTooLong()
        pieces, finish_reason = answer(prompt, request.sampling, self.limits.max_model_len - len(prompt))
        blocks = block_hashes(prompt, request.cache_salt, self.limits.block_size)
        sequence = _Sequence(blocks, len(prompt), pieces, finish_reason)
        self._waiting.append(sequence)
        self._arrived.set()
        try:
            while sequence.said < len(pieces) or not sequence.deltas.empty():
                if (delta := await sequence.deltas.get()) is None:
                    raise EngineDead()
                yield delta
        finally:
            for place in (self._waiting, self._running):
                if sequence in place:
                    place.remove(sequence)

    async def check_health(self) -> None:
        """Raise EngineDead if no steps are run."""
        if self._loop_task is None or self._loop_task.done():
            raise EngineDead()

    async def stop(self) -> None:
        """Run no more steps; running requests raise EngineDead."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])

    async def _run_steps(self) -> None:
        clock = asyncio.get_running_loop().time
        try:
            while True:
                if not self._waiting and not self._running:
                    self._arrived.clear()
                    await self._arrived.wait()
                began = clock()
                self._admit(began)
                running = list(self._running)
                step_s = STEP_S + STEP_S_PER_SEQUENCE * len(running) + self._prefill() / PREFILL_TOKENS_PER_S
                await asyncio.sleep(max(0.0, began + step_s * self._time_scale - clock()))
                # A request that is aborted during the step, or whose prompt is not done, gets no token.
                for sequence in running:
                    if sequence in self._running and not sequence.to_compute:
                        self._deliver(sequence, clock())
        finally:
            for sequence in (*self._waiting, *self._running):
                sequence.deltas.put_nowait(None)

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < self.limits.max_num_seqs:
            sequence = self._waiting.popleft()
            # As in vLLM, the last prompt token is always computed, since its output is needed.
            usable = sequence.blocks[: (sequence.to_compute - 1) // self.limits.block_size]
            sequence.cached_tokens = self._cache.match(usable) * self.limits.block_size
            sequence.to_compute -= sequence.cached_tokens
            sequence.scheduled_at = now
            self._running.append(sequence)

    def _prefill(self) -> int:
        """Share this step's budget among the prompts, first come first served; return the tokens computed."""
        budget = left = max(1, self._max_batch_tokens - sum(not sequence.to_compute for sequence in self._running))
        for sequence in self._running:
            share = min(sequence.to_compute, left)
            sequence.to_compute -= share
            left -= share
        return budget - left

    def _deliver(self, sequence: _Sequence, now: float) -> None:
        if sequence.prefill_s is None:
            sequence.prefill_s = now - sequence.scheduled_at
            self._cache.add(sequence.blocks)
        text = sequence.pieces[sequence.said]
        sequence.said += 1
        reason = sequence.finish_reason if sequence.said == len(sequence.pieces) else None
        sequence.deltas.put_nowait(Delta(text, sequence.said, sequence.cached_tokens, sequence.prefill_s, reason))
        if reason:
            self._running.remove(sequence)


def block_hashes(token_ids: list[int], cache_salt: str, block_size: int) -> list[bytes]:
    """Return the chained hash of each full block; the salt, which begins the chain, is part of all of them."""
    parent, hashes = hashlib.sha256(cache_salt.encode()).digest(), []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hashlib.sha256(parent + array("Q", token_ids[start : start + block_size]).tobytes()).digest()
        hashes.append(parent)
    return hashes


def answer(prompt: list[int], sampling: Sampling, room: int) -> tuple[list[str], FinishReason]:
    """Return the answer's tokens as text, at most `room` of them, and how it ends."""
    rng = random.Random(hashlib.sha256(f"{sampling.seed}/".encode() + array("Q", prompt).tobytes()).digest())
    length, allowed = rng.randint(SHORTEST_TOKENS, LONGEST_TOKENS), min(sampling.max_tokens, room)
    pieces = [f"{rng.choice(WORDS)} " for _ in range(min(length, allowed))]
    return pieces, "stop" if length <= allowed else "length"
