"""What a run's record says.

Times to first token are of the requests that arrived once the caches had filled: the first `WARM_UP` of each run is left
out. Hits are counted from the very beginning, beside the bound: every profile is computed once, somewhere, and
whatever profiles have in common is, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.schedulinglab.fleet import Fleet, Run
from bench.schedulinglab.scenarios import Workload

#: The share of requests, by arrival, that may find caches still filling.
WARM_UP = 0.3
#: In time is a first token within this, in seconds, about four times what a cold profile takes alone, and ...
TTFT_SLO_S = 1.0
#: ... on average as much for each further token.
TPOT_SLO_S = 0.05
#: How many requests with a cached profile one worker serves in a second: 172 tokens each at 64 abreast, and their own prompts.
SERVED_PER_S = 37


@dataclass(frozen=True, slots=True)
class Figures:
    """Times in seconds. `in_time` is the share of requests within the SLO.

    `hits` is the number of prompt tokens found in caches, as a share of the bound. `imbalance` is how much longer the busiest worker
    was busy than the average one. `computed` is the share of all prompt tokens that were computed. `unfinished` requests
    never ended. Of a crowd, `spread_s` is how long after its first request as many workers as it needs had served it.
    """

    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    in_time: float
    hits: float
    imbalance: float
    computed: float
    preemptions: int
    unfinished: int
    crowd_p90: float | None = None
    spread_s: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Return what applies, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def figures(fleet: Fleet, workload: Workload, runs: Sequence[Run]) -> Figures:
    """Return the figures of a run that has ended."""
    counted = runs[int(WARM_UP * len(runs)) :]
    waits = sorted(run.ttft for run in counted)
    crowd = sorted(run.ttft for run in runs if run.ask.profile is workload.crowd)
    busy = [worker.busy_between() for worker in fleet.workers if worker.alive]
    cached = sum(run.cached_tokens for run in runs)
    computed = sum(run.ask.tokens - run.cached_tokens for run in runs)
    return Figures(
        ttft_p50=percentile(waits, 0.5),
        ttft_p90=percentile(waits, 0.9),
        ttft_p99=percentile(waits, 0.99),
        in_time=sum(map(in_time, counted)) / len(counted),
        hits=cached / bound(fleet, runs),
        imbalance=max(busy) / (sum(busy) / len(busy)),
        computed=computed / sum(run.ask.tokens for run in runs),
        preemptions=sum(worker.batch.preemptions for worker in fleet.workers),
        unfinished=sum(math.isinf(run.done_at) for run in runs),
        crowd_p90=percentile(crowd, 0.9) if crowd else None,
        spread_s=spread([run for run in runs if run.ask.profile is workload.crowd]),
    )


def spread(crowd: Sequence[Run]) -> float | None:
    """Return how long after its first request as many workers had served a crowd as it needs; None if there is no crowd."""
    if not crowd:
        return None
    arrivals = [run.ask.at for run in crowd]
    needed = math.ceil(len(crowd) / (max(arrivals) - min(arrivals)) / SERVED_PER_S)
    firsts: dict[int, float] = {}
    for run in crowd:
        firsts[run.worker] = min(run.first_at, firsts.get(run.worker, math.inf))
    served = sorted(firsts.values())
    return served[needed - 1] - min(arrivals) if len(served) >= needed else math.inf


def in_time(run: Run) -> bool:
    """Tell whether a request was within the SLO."""
    return run.ttft <= TTFT_SLO_S and run.done_at - run.first_at <= TPOT_SLO_S * max(1, run.output_tokens - 1)


def bound(fleet: Fleet, runs: Sequence[Run]) -> int:
    """Return how many tokens caches would give if every block of a static part were computed once in the fleet."""
    size, seen, total = fleet.options.block_size, set[bytes](), 0
    for profile, organization in {(run.ask.profile, run.ask.organization) for run in runs}:
        seen.update(fleet.hashes(profile, organization))
    for run in runs:
        total += len(fleet.hashes(run.ask.profile, run.ask.organization)) * size
    return total - len(seen) * size


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that so large a share is not above."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
