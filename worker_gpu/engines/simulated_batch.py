"""Continuous batching over a paged KV cache, after vLLM's scheduler, as a machine that knows neither clock nor loop.

Whoever drives it says what time it is. He calls `step(now)` when `due_at()` says so; the step takes the seconds it
returns, its tokens are there at their end, and the next step must not begin earlier. The same requests at the same
times therefore give the same tokens at the same times, whether the seconds are slept through or skipped.

One step has a budget of tokens, and goes through the running sequences in the order of their admission:

1. A sequence whose prompt is computed gets its next token. If that needs a block and none is free, the sequence
   admitted last is preempted: it loses its blocks, goes back to the head of the queue, and will have all its tokens
   computed again, but for those still in the cache. It may be the very sequence that needs the block.
2. A sequence whose prompt is not computed yet has as much of it computed as the budget allows, and no more in one step than
   `long_prefill_token_threshold` tokens.
3. Waiting sequences are admitted in order, while there are slots, budget, and blocks for all their tokens so far. What
   the cache knows of these is not computed again, except the last token, whose output is needed. (A sequence that
   was preempted in this step heads the queue and finds one block fewer than it had, so nobody follows it at once.)

Blocks are known to the cache as soon as their computation is scheduled, as in vLLM, so that requests that arrive
together share a prompt. The choices of one request share it in the same way: each is a sequence of its own.

It cannot come to a standstill: a sequence's tokens always fit the blocks in all, so the sequence admitted first can
always go on once the others have been preempted, and the one that heads the queue can be admitted when none runs.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from worker_gpu.engines.base import EngineLimits, EngineLoad, GenerationRequest
from worker_gpu.engines.kv_events import KvEvents
from worker_gpu.engines.paged_cache import BlockPool
from worker_gpu.engines.simulated_options import SimulationOptions
from worker_gpu.engines.simulated_sequence import Sequence, Token, make_sequences

#: A paced stream that is late by more than this many tokens has lost that time; it does not hurry to make up for it.
HELD_UP_PERIODS = 2


class Step(NamedTuple):
    """How long a step takes, and the tokens that are there at its end."""

    seconds: float
    tokens: list[Token]


@dataclass(slots=True)
class _Work:
    """What a step has left to give, and what it has given."""

    budget: int
    prompt_budget: int
    tokens: list[Token] = field(default_factory=list)
    sequences: int = 0
    prompt_tokens: int = 0


class ContinuousBatch:
    """Runs requests in steps. KV events are passed on while `step` and `clear_cache` run."""

    def __init__(self, options: SimulationOptions) -> None:
        self.limits = EngineLimits(
            options.context_window,
            options.max_num_seqs,
            options.block_size,
            cache_tokens=options.num_blocks * options.block_size,
        )
        self.events = KvEvents()
        self.pool = BlockPool(options.num_blocks, options.block_size, self.events, caching=options.prefix_caching)
        self.preemptions = 0
        self._options = options
        self._block_size = options.block_size
        self._longest_part = options.long_prefill_token_threshold or options.max_batch_tokens
        self._time = options.step_time
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._requests: dict[str, list[Sequence]] = {}
        self._due_at = -math.inf

    def add(self, request: GenerationRequest) -> list[Sequence]:
        """Queue a request; return its sequences, one a choice.

        Raises PromptTooLong if no token could be added to the prompt, Unsupported if a real model would be needed,
        ValueError if a request of this id is running.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request {request.request_id} is running")
        sequences = make_sequences(request, self._options)
        self._waiting.extend(sequences)
        self._requests[request.request_id] = list(sequences)
        self._due_at = -math.inf
        return sequences

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; one that is unknown or finished is none."""
        for sequence in self._requests.pop(request_id, ()):
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            else:
                self._running.remove(sequence)
                self.pool.release(sequence.blocks)
            self._due_at = -math.inf

    @property
    def load(self) -> EngineLoad:
        """Return what there is to do now."""
        held = 1 - self.pool.free / self._options.num_blocks
        return EngineLoad(len(self._running), len(self._waiting), held, self.preemptions)

    def due_at(self) -> float:
        """Return from when on `step` has something to do: -inf is at once, inf is never, unless requests come."""
        return self._due_at if self._running or self._waiting else math.inf

    def step(self, now: float) -> Step:
        """Run one step that begins `now`, in seconds; it takes 0 seconds if nothing was due."""
        limit = self._options.max_batch_tokens
        work = _Work(limit, min(limit, self._time.prompt_limit or limit))
        index = 0
        # Preemption takes sequences from the end of the list, which this one has not reached yet.
        while index < len(self._running) and work.budget:
            sequence = self._running[index]
            if sequence.due <= now:
                self._advance(sequence, work)
            index += 1
        while work.budget and work.prompt_budget and self._admit(now):
            self._advance(self._running[-1], work)
        if not work.sequences:
            self._due_at = min((sequence.due for sequence in self._running), default=-math.inf)
            return Step(0.0, work.tokens)
        self._due_at = -math.inf
        seconds = self._time.seconds(work.sequences, work.prompt_tokens)
        self._settle(work.tokens, now + seconds)
        return Step(seconds, work.tokens)

    def clear_cache(self) -> bool:
        """Forget all cached blocks, unless sequences are running; return whether it was done."""
        return self.pool.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless exactly the running sequences hold blocks, and enough of them."""
        self.pool.check_integrity()
        for sequence in self._waiting:
            if sequence.blocks or sequence.computed:
                raise AssertionError("a waiting sequence holds blocks")
        for sequence in self._running:
            if len(sequence.blocks) * self._block_size < sequence.computed:
                raise AssertionError("a running sequence has more tokens than its blocks hold")
        if {block for sequence in self._running for block in sequence.blocks} != self.pool.in_use:
            raise AssertionError("a block is in use by no sequence")

    def _admit(self, now: float) -> bool:
        """Let the first waiting sequence run, if there is a slot and blocks for it; return whether it runs."""
        if not self._waiting or len(self._running) >= self.limits.max_num_seqs:
            return False
        sequence, size = self._waiting[0], self._block_size
        known = sequence.prompt_tokens + sequence.said
        found = self.pool.match(sequence.hashes[: (known - 1) // size])
        missing = math.ceil(known / size) - len(found)
        if missing > self.pool.free_beside(found):
            return False
        self.pool.refer(found)
        sequence.blocks = found + self.pool.allocate(missing)
        sequence.stored = len(found)
        sequence.computed = len(found) * size
        if sequence.scheduled_at is None:
            sequence.scheduled_at, sequence.cached_tokens = now, sequence.computed
        self._running.append(self._waiting.popleft())
        return True

    def _advance(self, sequence: Sequence, work: _Work) -> None:
        """Schedule what the sequence needs next, within what is left of the step."""
        count = missing = sequence.prompt_tokens + sequence.said - sequence.computed
        if missing == 1 and sequence.said:
            if sequence.computed == len(sequence.blocks) * self._block_size and not self._grow(sequence):
                return
        else:
            count = min(missing, work.budget, work.prompt_budget, self._longest_part)
            if not count:
                return
            work.prompt_tokens += count
            work.prompt_budget -= count
        work.sequences += 1
        work.budget -= count
        sequence.computed += count
        if sequence.computed // self._block_size > sequence.stored:
            self._store(sequence)
        if count == missing:
            work.tokens.append(Token(sequence, sequence.said))
            sequence.said += 1

    def _store(self, sequence: Sequence) -> None:
        """Make the sequence's newly filled blocks known to the cache."""
        new = slice(sequence.stored, sequence.computed // self._block_size)
        parent = sequence.hashes[new.start - 1] if new.start else None
        sequence.blocks[new] = self.pool.store(sequence.blocks[new], sequence.hashes[new], parent)
        sequence.stored = new.stop

    def _grow(self, sequence: Sequence) -> bool:
        """Give the sequence one more block; return False if it had to be preempted itself."""
        while not self.pool.free:
            victim = self._running.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self.pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        self._waiting.appendleft(sequence)

    def _settle(self, tokens: list[Token], end: float) -> None:
        """Note what the step's tokens mean for their sequences, at the step's end."""
        period_s, finished = self._time.period_s, False
        for sequence, position in tokens:
            if not position:
                sequence.first_token_at = end
            if period_s:
                # Reckoned from when it was due, so that the mean pace is exact, unless the sequence was held up. A
                # step takes time, too, and is begun that much earlier.
                held_up = end - sequence.due > HELD_UP_PERIODS * period_s
                sequence.due = (end - self._time.step_s if held_up else sequence.due) + period_s
            if position == sequence.length - 1:
                finished = True
                self._finish(sequence)
        if finished:
            self._running = [s for s in self._running if s.said < s.length]

    def _finish(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        request_id = sequence.request.request_id
        self._requests[request_id].remove(sequence)
        if not self._requests[request_id]:
            del self._requests[request_id]
