"""What becomes of a gateway's memory over very many requests."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from bench.overheadlab.ours import OurSite
from bench.overheadlab.rounds import Load, Rounds
from bench.overheadlab.system import System
from bench.overheadlab.usage import largest_rss_mb, memory_mb

#: Requests between two looks; every other time they are streams.
STEP = 1_000
CLIENTS = 16
#: The beginning, in which caches fill and pools grow, says nothing about growth.
SETTLING = 0.2


def grow(rounds: Rounds, site: OurSite, system: System, requests: int, say: Callable[[str], None]) -> dict[str, float]:
    """Ask so many requests; return the gateway's memory and its growth, and that of the others."""
    gateway: list[float] = []
    others = {part: roots for part, roots in site.parts.items() if part != "gateway"}
    looks: dict[str, list[float]] = {part: [] for part in others}
    for step in range(max(2, requests // STEP)):
        stream = bool(step % 2)
        rounds.cell(system, Load("memory", stream, CLIENTS), STEP)
        gateway.append(largest_rss_mb(site.parts["gateway"]))
        for part, roots in others.items():
            looks[part].append(memory_mb(roots))
        if not (step + 1) % 5:
            say(f"{(step + 1) * STEP:,} requests: gateway {gateway[-1]:.1f} MB")
    settled = round(len(gateway) * SETTLING)
    return {
        "memory requests": float(rounds.answered[system.name]),
        "memory gateway_mb": max(gateway),
        "memory gateway_first_mb": gateway[0],
        "memory gateway_growth_mb": _slope(gateway[settled:]) * len(gateway),
        **{f"memory {part}_mb": found[-1] for part, found in looks.items()},
        **{f"memory {part}_growth_mb": _slope(found[settled:]) * len(found) for part, found in looks.items()},
    }


def _slope(values: list[float]) -> float:
    """Return the growth from one value to the next, by least squares."""
    return statistics.linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0
