"""Whether the machine was fast enough: how much of a core each process used, in all and at the busiest time.

What is simulated holds only while no process keeps another waiting for a processor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import psutil

from bench.overheadlab.usage import family

EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Load:
    """Parts of a core: over the whole time, and over the busiest ten seconds of it."""

    mean: float
    most: float


class Watch:
    """Looks until it is left; a context manager. `parts` are processes by what they do; the children they have belong to them.

    One that several parts would have is of the first of them: the process that runs all this is the parent of most.
    `machine` is how busy the whole machine was with these and all other processes, as a share of its cores. What runs at a lower
    priority is not counted, since it is given only what these leave.
    """

    def __init__(self, parts: Mapping[str, Sequence[psutil.Process]]) -> None:
        self.machine = 0.0
        self._parts = parts
        self._part_of: dict[int, str] = {}
        self._processes: list[psutil.Process] = []
        self._used: dict[int, float] = {}
        self._began = self._looked_at = 0.0
        self._total: dict[int, float] = {}
        self._most: dict[int, float] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def loads(self) -> dict[str, Load]:
        """Return the load of each part's busiest process."""
        elapsed_s = self._looked_at - self._began
        return {
            part: Load(
                max((used for pid, used in self._total.items() if self._part_of[pid] == part), default=0.0) / elapsed_s,
                max((share for pid, share in self._most.items() if self._part_of[pid] == part), default=0.0),
            )
            for part in self._parts
        }

    def __enter__(self) -> Self:
        # Looked up only once: to look through all processes of a machine takes long enough to disturb.
        for part, roots in self._parts.items():
            found = [process for process in family(roots) if process.pid not in self._part_of]
            self._part_of |= {process.pid: part for process in found}
            self._processes += found
        psutil.cpu_times_percent()
        self._began = self._looked_at = time.monotonic()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        self._left.set()
        self._thread.join()
        self._look()
        spent = psutil.cpu_times_percent()
        self.machine = 1 - (spent.idle + spent.iowait + spent.nice) / 100

    def _run(self) -> None:
        while not self._left.wait(EVERY_S):
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        elapsed_s, self._looked_at = now - self._looked_at, now
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                self._note(process.pid, sum(process.cpu_times()[:2]), elapsed_s)

    def _note(self, pid: int, used_s: float, elapsed_s: float) -> None:
        spent_s = used_s - self._used.get(pid, used_s)
        self._used[pid] = used_s
        self._total[pid] = self._total.get(pid, 0.0) + spent_s
        # The last look may follow another at once: what is too short says nothing.
        share = spent_s / elapsed_s if elapsed_s > EVERY_S / 2 else 0.0
        self._most[pid] = max(self._most.get(pid, 0.0), share)
