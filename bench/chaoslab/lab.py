"""What a scenario is given, and what it gives back."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.settings import PREFIX

#: Beginnings of variables that are the developer's own.
NOT_PASSED_ON = (PREFIX, "COVERAGE_", "REDIS_", "DATABASE_", "PYTHONDONTWRITEBYTECODE")
#: A comparison, `<=` or `>=`, and a number.
Target = tuple[str, float]


@dataclass(frozen=True, slots=True)
class Lab:
    """Where a scenario works. `scale` shortens it: 1 is the full size, 0.05 a twentieth of counts and durations.

    `folder` is empty and its own; `model` is a checkpoint whose tokenizer the gateway reads.
    """

    folder: Path
    model: Path
    seed: int
    scale: float = 1.0
    say: Callable[[str], None] = print

    def rng(self, name: str) -> random.Random:
        """Return the scenario's own source of chance: the same seed does the same harm, whatever ran before."""
        return random.Random(f"{name} {self.seed}")

    def count(self, full: int, least: int = 1) -> int:
        """Return a scaled number of things, never fewer than `least`."""
        return max(least, round(full * self.scale))

    def seconds(self, full: float, least: float) -> float:
        """Return a scaled duration, never shorter than `least` seconds."""
        return max(least, full * self.scale)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured, and what of it must be at most or at least so much. `examples` tell of what went wrong.

    `timed` are the targets that a slow or busy machine may miss through nobody's fault.
    """

    figures: Mapping[str, float]
    targets: Mapping[str, Target]
    examples: Sequence[str] = ()
    timed: Collection[str] = ()

    def missed(self, patience: float = 1.0) -> list[str]:
        """Return each figure that misses its target, in words; of a timed one, by `patience` times at least."""
        found = []
        for name, (comparison, bound) in self.targets.items():
            allowed = bound * patience if name in self.timed else bound
            if not (self.figures[name] <= allowed if comparison == "<=" else self.figures[name] >= bound):
                found.append(f"{name} is {self.figures[name]:g}, not {comparison} {allowed:g}")
        return found


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value that `part` of all do not exceed (nearest rank), or 0 of none."""
    if not values:
        return 0.0
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def environment() -> dict[str, str]:
    """Return what every process of a scenario gets: this one's environment, without settings of a gateway or coverage."""
    return {name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED_ON)}
