"""Simulated workers in virtual time, and what is recorded of each request.

Each worker is the simulated engine's own batch (docs/simulation.md), which is driven step by step. Time jumps from one
event to the next: a request arrives, a step ends, a rule wants to be called again. So a run is exact and can be repeated,
however slow or busy the machine is.

A rule (`Rule`) decides which worker a request goes to, when it arrives or later. It learns what a gateway would: that a
step ended with first tokens and last ones. What a worker's cache holds it may ask the worker itself, which is exact.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from bench.schedulinglab.workload import SALT, Ask, Profile
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.block_hashes import block_hashes
from worker_gpu.engines.simulated_batch import ContinuousBatch
from worker_gpu.engines.simulated_options import SimulationOptions
from worker_gpu.engines.simulated_sequence import Token


@dataclass(slots=True, eq=False)
class Run:
    """What became of a request. Times are in seconds, infinite while it has not happened."""

    ask: Ask
    worker: int = -1
    cached_tokens: int = 0
    output_tokens: int = 0
    scheduled_at: float = math.inf
    first_at: float = math.inf
    done_at: float = math.inf

    @property
    def ttft(self) -> float:
        """Return the seconds from arrival to first token."""
        return self.first_at - self.ask.at


class Rule(Protocol):
    """Decides where requests run."""

    def start(self, fleet: Fleet) -> None:
        """Get to know the fleet, before anything happens."""
        ...

    def arrive(self, run: Run) -> None:
        """Take a request that has just arrived."""
        ...

    def progress(self, worker: Worker, firsts: list[Run], lasts: list[Run]) -> None:
        """Hear that a step of `worker` has ended, with the first tokens and with the last tokens of these."""
        ...

    def lost(self, worker: Worker, runs: list[Run]) -> None:
        """Hear that a worker died, with these requests in hand."""
        ...

    def close(self) -> None:
        """Free what the rule holds."""
        ...


class Worker:
    """One engine, by its number in the fleet."""

    def __init__(self, fleet: Fleet, number: int, options: SimulationOptions) -> None:
        self.fleet = fleet
        self.number = number
        self.name = f"gpu@{number}"
        self.batch = ContinuousBatch(options)
        self.alive = True
        self.in_hand: dict[str, Run] = {}
        #: Requests that nobody made, and that have not ended.
        self.unasked: dict[str, Callable[[], None]] = {}
        #: When each step began and how long it took.
        self.steps: list[tuple[float, float]] = []
        self._stepping = False

    def submit(self, run: Run) -> None:
        """Give the engine a request, now."""
        run.worker = self.number
        request = run.ask.to_engine()
        self.in_hand[request.request_id] = run
        self.batch.add(request)
        if not self._stepping:
            self._step()

    def submit_unasked(self, request: GenerationRequest, done: Callable[[], None]) -> None:
        """Give the engine a request for one token that nobody made; `done` is called at its end."""
        self.unasked[request.request_id] = done
        self.batch.add(request)
        if not self._stepping:
            self._step()

    def cached_tokens(self, profile: Profile, organization: str) -> int:
        """Return how many tokens of the profile's beginning the cache holds."""
        return self.known(self.fleet.hashes(profile, organization)) * self.batch.limits.block_size

    def known(self, hashes: Sequence[bytes]) -> int:
        """Return how many of a chain's blocks the cache holds.

        What is known is a tree with all its roots, so they are the first ones.
        """
        known = self.batch.pool.known
        return bisect.bisect_left(range(len(hashes)), 1, key=lambda index: hashes[index] not in known)

    def busy_between(self, begin: float = 0.0, end: float = math.inf) -> float:
        """Return for how many seconds the engine computed between two instants."""
        return sum(max(0.0, min(end, at + took) - max(begin, at)) for at, took in self.steps)

    def die(self) -> list[Run]:
        """End at once; return what was in hand."""
        self.alive = False
        runs = list(self.in_hand.values())
        self.in_hand.clear()
        return runs

    def _step(self) -> None:
        fleet = self.fleet
        step = self.batch.step(fleet.now)
        self._stepping = bool(step.seconds)
        if not self._stepping:
            return
        self.steps.append((fleet.now, step.seconds))
        fleet.at(fleet.now + step.seconds, partial(self._end, step.tokens))

    def _end(self, tokens: Iterable[Token]) -> None:
        if not self.alive:
            return
        self._stepping = False
        firsts, lasts, now = [], [], self.fleet.now
        for sequence, position in tokens:
            if 0 < position < sequence.length - 1:
                continue
            if (done := self.unasked.pop(sequence.request.request_id, None)) is not None:
                done()
                continue
            if not position:
                run = self.in_hand[sequence.request.request_id]
                if run.first_at == math.inf:
                    run.first_at, run.cached_tokens = now, sequence.cached_tokens
                run.scheduled_at = now if sequence.scheduled_at is None else sequence.scheduled_at
                firsts.append(run)
            if position == sequence.length - 1:
                run = self.in_hand.pop(sequence.request.request_id)
                run.done_at, run.output_tokens = now, sequence.length
                lasts.append(run)
        if firsts or lasts:
            self.fleet.rule.progress(self, firsts, lasts)
        if not self._stepping:
            self._step()


@dataclass
class Fleet:
    """So many workers under one rule. `now` is the time in seconds."""

    rule: Rule
    size: int
    options: SimulationOptions
    now: float = 0.0
    #: Whether more requests will come.
    arriving: bool = True
    workers: list[Worker] = field(init=False)
    runs: list[Run] = field(init=False, default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(init=False, default_factory=list)
    _order: itertools.count[int] = field(init=False, default_factory=itertools.count)
    _hashes: dict[tuple[str, str], list[bytes]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.workers = [Worker(self, number, self.options) for number in range(self.size)]

    def at(self, time: float, what: Callable[[], None]) -> None:
        """Do something then; what is due at the same time happens in the order in which it was asked for."""
        heapq.heappush(self._events, (time, next(self._order), what))

    def hashes(self, profile: Profile, organization: str) -> list[bytes]:
        """Return the hashes of a profile's full blocks."""
        key = profile.name, organization
        if key not in self._hashes:
            size = self.options.block_size
            self._hashes[key] = block_hashes(profile.token_ids, f"{SALT}:{organization}", size)
        return self._hashes[key]

    def serve(self, asks: Iterable[Ask], losses: Iterable[tuple[float, int]] = ()) -> list[Run]:
        """Run all requests to their ends; return what became of them. `losses` are (time, worker that dies then)."""
        self.rule.start(self)
        for time, number in losses:
            self.at(time, partial(self._lose, self.workers[number]))
        for ask in asks:
            self._until(ask.at)
            self.now = ask.at
            run = Run(ask)
            self.runs.append(run)
            self.rule.arrive(run)
        self.arriving = False
        self._until(math.inf)
        return self.runs

    def _lose(self, worker: Worker) -> None:
        self.rule.lost(worker, worker.die())

    def _until(self, time: float) -> None:
        events = self._events
        while events and events[0][0] <= time:
            self.now, _, what = heapq.heappop(events)
            what()
