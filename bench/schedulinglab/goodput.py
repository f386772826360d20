"""The highest rate at which nine requests in ten are within the SLO, by bisection."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from bench.schedulinglab.running import Job, in_processes, run

SHARE = 0.9
#: Between these, in requests a second, and to within this.
SLOWEST, FASTEST, PRECISION = 10.0, 330.0, 5.0
#: (rate, share of requests within the SLO), by rate.
Curve = list[tuple[float, float]]


def curves(
    rules: Sequence[str], scenario: str, requests: int, seed: int, processes: int
) -> tuple[dict[str, float], dict[str, Curve]]:
    """Return each rule's highest rate, and the shares that were found on the way to it."""
    search = partial(bisect, scenario=scenario, requests=requests, seed=seed)
    found = dict(zip(rules, in_processes(search, rules, processes), strict=True))
    return {rule: rate for rule, (rate, _) in found.items()}, {rule: curve for rule, (_, curve) in found.items()}


def bisect(rule: str, scenario: str, requests: int, seed: int) -> tuple[float, Curve]:
    """Return the highest rate of a rule, SLOWEST if even that is too much, and what was found on the way."""
    low, high = SLOWEST, FASTEST
    points: Curve = []
    while high - low > PRECISION:
        rate = (low + high) / 2
        share = run(Job(rule, scenario, rate, requests, seed)).figures.in_time
        points.append((rate, share))
        if share >= SHARE:
            low = rate
        else:
            high = rate
    return low, sorted(points)
