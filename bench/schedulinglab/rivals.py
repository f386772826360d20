"""Routers after the published rules of other gateways, with their default numbers. They are models, not their code.

Where a rule leaves a choice, it is made in the rule's favour: loads and cache contents that a router would learn late or
roughly are exact and at once here, unless the rule itself guesses them. What is left out is said at each.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter, defaultdict

from bench.schedulinglab.fleet import Fleet, Run, Worker
from bench.schedulinglab.push import Router, load


class CacheAware(Router):
    """SGLang's router, `cache_aware`: a tree of what was sent where, not of what is cached.

    While loads differ by more than 64 requests and by more than half, the least loaded worker gets the request. Else the
    one that was sent the longest beginning of it, if that is more than 0.3 of it, else the one with the smallest tree.
    A node's worker is any of those it was sent to: here as in the router, the one noted there last, which is
    noted at one request in sixteen. Trees are cut every two minutes if they pass 2^26 characters, which no run here reaches.
    """

    THRESHOLD, ABSOLUTE, RELATIVE, NOTED = 0.3, 64, 1.5, 1 / 16

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._sent_to: dict[str, dict[int, None]] = defaultdict(dict)
        self._noted: dict[str, int] = {}
        self._sizes: Counter[int] = Counter()

    def choose(self, run: Run) -> Worker:
        """Return the worker that the thresholds say."""
        live = self.live
        loads = [load(worker) for worker in live]
        if max(loads) - min(loads) > self.ABSOLUTE and max(loads) > self.RELATIVE * min(loads):
            return self.smallest(live, load)
        for link, tokens in reversed(run.ask.profile.links):
            tenants = [number for number in self._sent_to[link] if self.fleet.workers[number].alive]
            if tenants and tokens > self.THRESHOLD * run.ask.tokens:
                noted = self._noted.get(link, -1)
                return self.fleet.workers[noted if noted in tenants else tenants[0]]
        return self.smallest(live, lambda worker: self._sizes[worker.number])

    def sent(self, worker: Worker, run: Run) -> None:
        """Insert the request into the worker's tree."""
        begin = 0
        for link, end in run.ask.profile.links:
            if worker.number not in self._sent_to[link]:
                self._sent_to[link][worker.number] = None
                self._sizes[worker.number] += end - begin
            if self.chance.random() < self.NOTED:
                self._noted[link] = worker.number
            begin = end
        self._sizes[worker.number] += run.ask.own_tokens


class PrefixHash(Router):
    """SGLang's router, `prefix_hash`: the first 256 tokens, hashed to a ring; loads are bounded by 1.25 of their mean.

    If the worker that the ring names is above the bound, the least loaded one gets the request.
    """

    TOKENS, FACTOR, POINTS = 256, 1.25, 160

    def start(self, fleet: Fleet) -> None:
        """Place each worker at many points of the ring."""
        super().start(fleet)
        self._ring = sorted(
            (_hash(f"{worker.name}#{point}"), worker.number) for worker in fleet.workers for point in range(self.POINTS)
        )

    def choose(self, run: Run) -> Worker:
        """Return the ring's worker, or the least loaded one."""
        live = self.live
        key = _hash(str(run.ask.profile.token_ids[: self.TOKENS]))
        start = bisect.bisect(self._ring, (key, -1))
        points = (self._ring[(start + step) % len(self._ring)][1] for step in range(len(self._ring)))
        named = next(worker for number in points if (worker := self.fleet.workers[number]).alive)
        mean = sum(map(load, live)) / len(live)
        return named if load(named) <= self.FACTOR * mean else self.smallest(live, load)


class LlmD(Router):
    """llm-d's scorers: prefix 3 (from the engines' own events), queue 2, KV-cache utilisation 2; the highest sum wins.

    Scores are between 0 and 1. Prefix and queue are scaled between the least and the most of all workers, the queue
    is what waits inside the engine. A router would know both as of its last scrape; here they are exact. Nothing is
    said here of its optional plug-ins, such as the limit on how much a hit may cost in waiting.
    """

    PREFIX, QUEUE, UTILISATION = 3.0, 2.0, 2.0

    def choose(self, run: Run) -> Worker:
        """Return the worker with the best score."""
        live, ask = self.live, run.ask
        cached = _scaled([worker.cached_tokens(ask.profile, ask.organization) for worker in live])
        queues = _scaled([worker.batch.load.waiting for worker in live])
        scores = {
            worker.number: self.PREFIX * prefix + self.QUEUE * (1 - queue) + self.UTILISATION * (1 - _usage(worker))
            for worker, prefix, queue in zip(live, cached, queues, strict=True)
        }
        return self.smallest(live, lambda worker: -scores[worker.number])


class Dynamo(Router):
    """NVIDIA Dynamo's cost: prompt blocks to be computed plus blocks in use, the least wins. Overlap counts as 1.0.

    Both are what they would be with the request: prompts sent to the worker whose first token has not come, less what
    its cache held of them; and the blocks of its unfinished requests, shared ones once. Blocks of answers are not counted.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._to_compute: Counter[int] = Counter()
        self._missing: dict[int, int] = {}
        self._in_use: dict[int, Counter[str]] = defaultdict(Counter)
        self._used: Counter[int] = Counter()

    def choose(self, run: Run) -> Worker:
        """Return the cheapest worker."""
        return self.smallest(self.live, lambda worker: self._cost(worker, run))

    def sent(self, worker: Worker, run: Run) -> None:
        """Count the request's tokens at the worker."""
        missing = self._uncached(worker, run)
        self._missing[run.ask.number] = missing
        self._to_compute[worker.number] += missing
        self._used[worker.number] += self._unshared(worker, run)
        for link, _ in run.ask.profile.links:
            self._in_use[worker.number][link] += 1

    def progress(self, worker: Worker, firsts: list[Run], lasts: list[Run]) -> None:
        """Take off what has been computed, and what is not in use any more."""
        for run in firsts:
            self._to_compute[worker.number] -= self._missing.pop(run.ask.number, 0)
        for run in lasts:
            for link, _ in run.ask.profile.links:
                self._in_use[worker.number][link] -= 1
            self._used[worker.number] -= self._unshared(worker, run)

    def _cost(self, worker: Worker, run: Run) -> float:
        to_compute = self._to_compute[worker.number] + self._uncached(worker, run)
        return to_compute + self._used[worker.number] + self._unshared(worker, run)

    def _uncached(self, worker: Worker, run: Run) -> int:
        return run.ask.tokens - worker.cached_tokens(run.ask.profile, run.ask.organization)

    def _unshared(self, worker: Worker, run: Run) -> int:
        """Return the prompt's tokens that no other request has in use there."""
        shared = (end for link, end in reversed(run.ask.profile.links) if self._in_use[worker.number][link] > 0)
        return run.ask.tokens - next(shared, 0)


def _usage(worker: Worker) -> float:
    return worker.batch.load.kv_usage or 0.0


def _scaled(values: list[int]) -> list[float]:
    """Return values between 0, the least, and 1, the most; 0 if all are the same."""
    least, most = min(values), max(values)
    return [(value - least) / (most - least) if most > least else 0.0 for value in values]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
