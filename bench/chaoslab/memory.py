"""How much memory a site's processes hold, as it goes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress

import psutil

from bench.chaoslab.process import Process

MIB = 2**20


class Memory:
    """Resident memory of some processes and their children together, looked at each time it is asked."""

    def __init__(self, processes: Iterable[Process]) -> None:
        self._processes = list(processes)
        self.seen: list[tuple[float, float]] = []

    def look(self) -> float:
        """Note how many MiB they hold now, and return it."""
        held = 0.0
        for process in self._processes:
            with suppress(psutil.Error):
                if process.pid is not None:
                    one = psutil.Process(process.pid)
                    held += sum(member.memory_info().rss for member in [one, *one.children(recursive=True)]) / MIB
        self.seen.append((time.time(), held))
        return held

    def peak(self, since: float, until: float) -> float:
        """Return the most that was seen between two instants of the wall clock; 0 if nobody looked."""
        return max((held for at, held in self.seen if since <= at <= until), default=0.0)
