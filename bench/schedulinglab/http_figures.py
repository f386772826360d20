"""What the systems made of the same requests: a table for people, and figures by name.

Hits count from the first request on, beside the bound where every profile is computed once, somewhere. All else is of the
requests after those that filled the caches. What was not answered counts as if its first token had come when the client
gave up, and is an error.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from bench.schedulinglab.figures import in_time, percentile, spread
from bench.schedulinglab.fleet import Run
from bench.schedulinglab.http_client import ANSWER_S, Served
from bench.schedulinglab.http_work import answer_tokens
from bench.schedulinglab.scenarios import OPTIONS, Workload

TTFT = ("ttft_p50", "ttft_p90", "ttft_p99")
NAMES = (*TTFT, "in_time", "hits", "imbalance", "errors")
CROWD_NAMES = ("crowd_p50", "crowd_p90", "crowd_p99", "spread_s")


def run_of(served: Served, workers: Mapping[str, int]) -> Run:
    """Return a request's record as the virtual fleet has it. `workers` tells who gave which answer."""
    ask, said = served.ask, served.said
    if said is None:
        return Run(ask)
    times = {"first_at": ask.at + served.first_s, "done_at": ask.at + served.whole_s}
    return Run(ask, workers[said.id], said.cached_tokens, answer_tokens(ask), **times)


def figures(
    workload: Workload, runs: Sequence[Run], filling: int, static_tokens: int, workers: int
) -> dict[str, float]:
    """Return what a system made of the requests, of which the first `filling` only fill the caches. Times in seconds."""
    counted = runs[filling:]
    waits = _waits(counted)
    shares = Counter(run.worker for run in counted if run.worker >= 0)
    found = {
        "ttft_p50": percentile(waits, 0.5),
        "ttft_p90": percentile(waits, 0.9),
        "ttft_p99": percentile(waits, 0.99),
        "in_time": statistics.mean(map(in_time, counted)),
        "hits": sum(run.cached_tokens for run in runs) / bound(runs, static_tokens),
        "imbalance": max(shares.values(), default=0) * workers / max(1, shares.total()),
        "errors": float(sum(math.isinf(run.done_at) for run in runs)),
    }
    if workload.crowd is not None:
        crowd = [run for run in runs if run.ask.profile is workload.crowd]
        waits = _waits(crowd)
        found |= {f"crowd_p{share}": percentile(waits, share / 100) for share in (50, 90, 99)}
        found["spread_s"] = min(spread(crowd) or 0.0, ANSWER_S)
    return found


def _waits(runs: Iterable[Run]) -> list[float]:
    return sorted(min(run.ttft, ANSWER_S) for run in runs)


def bound(runs: Sequence[Run], static_tokens: int) -> int:
    """Return how many tokens caches would give if every profile were computed once in the fleet."""
    size = OPTIONS.block_size
    return (len(runs) - len({run.ask.profile for run in runs})) * (static_tokens // size * size)


def combined(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median over seeds of each figure, with the least and the most of times."""
    found = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        found[name] = sum(values) if name == "errors" else statistics.median(values)
        if name in TTFT:
            found |= {f"{name} least": min(values), f"{name} most": max(values)}
    return found


def ratios(ours: Sequence[Mapping[str, float]], others: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return our times as parts of another's, seed by seed: median, least and most."""
    found: dict[str, float] = {}
    for name in TTFT:
        values = [mine[name] / theirs[name] for mine, theirs in zip(ours, others, strict=True)]
        found |= {name: statistics.median(values), f"{name} least": min(values), f"{name} most": max(values)}
    return found


def table(scenario: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return a line a system."""
    names = [name for name in (*NAMES, *CROWD_NAMES) if name in next(iter(rows.values()))]
    lines = [f"{scenario:<24}" + "".join(f"{name:>11}" for name in names)]
    for system, found in rows.items():
        lines.append(f"{system:<24}" + "".join(f"{found[name]:>11.3f}" for name in names))
    return "\n".join(lines)


def best(systems: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """Return, seed by seed, the least of several systems' times to first token, whichever has it."""
    return [{name: min(run[name] for run in runs) for name in TTFT} for runs in zip(*systems, strict=True)]
