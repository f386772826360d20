"""Routers that bind a request to a worker when it arrives, and the plain ones of them.

A router's own count of the requests that it sent to each worker and that have not ended is its idea of load. When a
worker dies, its requests are sent elsewhere at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from bench.schedulinglab.fleet import Fleet, Run, Worker


class Router:
    """What all routers have in common: they choose among live workers."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.fleet: Fleet

    def start(self, fleet: Fleet) -> None:
        """Get to know the fleet."""
        self.fleet = fleet

    def arrive(self, run: Run) -> None:
        """Send the request on at once."""
        worker = self.choose(run)
        self.sent(worker, run)
        worker.submit(run)

    def progress(self, worker: Worker, firsts: list[Run], lasts: list[Run]) -> None:
        """Hear of answers."""

    def lost(self, worker: Worker, runs: list[Run]) -> None:
        """Send what a dead worker had in hand elsewhere."""
        for run in runs:
            self.arrive(run)

    def close(self) -> None:
        """Hold nothing."""

    def choose(self, run: Run) -> Worker:
        """Return the worker that the request goes to."""
        raise NotImplementedError

    def sent(self, worker: Worker, run: Run) -> None:
        """Note where a request goes, just before it does."""

    @property
    def live(self) -> list[Worker]:
        """Return the workers that can be chosen."""
        return [worker for worker in self.fleet.workers if worker.alive]

    def smallest(self, workers: Sequence[Worker], key: Callable[[Worker], float]) -> Worker:
        """Return a worker with the smallest key, any of them where several have it."""
        keys = [key(worker) for worker in workers]
        least = min(keys)
        return self.chance.choice([worker for worker, value in zip(workers, keys, strict=True) if value == least])


def load(worker: Worker) -> int:
    """Return how many requests a worker has been sent and not finished."""
    return len(worker.in_hand)


class RoundRobin(Router):
    """One after the other."""

    _turn = 0

    def choose(self, run: Run) -> Worker:
        """Return the next worker."""
        self._turn += 1
        return self.live[self._turn % len(self.live)]


class LeastLoaded(Router):
    """Wherever the fewest requests are."""

    def choose(self, run: Run) -> Worker:
        """Return a worker with the fewest requests."""
        return self.smallest(self.live, load)
