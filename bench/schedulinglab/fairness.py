"""Whether a flood by one organization reaches the others.

Ten organizations have 15 profiles each. Nine of them ask at a calm pace. In the second run the tenth floods the queue midway,
for `FLOOD_S` seconds and with several times what the fleet can serve; the nine ask exactly as before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from bench.schedulinglab.figures import percentile
from bench.schedulinglab.fleet import Run
from bench.schedulinglab.running import OURS, serve
from bench.schedulinglab.scenarios import EXPONENT, OWN_TOKENS, PROFILE_TOKENS, Workload
from bench.schedulinglab.workload import Ask, poisson, profiles, zipf

ORGANIZATIONS, PROFILES_EACH = 10, 15
CALM_RATE, FLOOD_RATE, CALM_S, FLOOD_S = 90.0, 600.0, 40.0, 5.0
FLOODER = "flooder"


@dataclass(frozen=True, slots=True)
class Fairness:
    """The others' 99th percentile of the time to first token, in seconds, while nobody floods and while somebody does.

    `busy` is the share of the time that the workers computed while the flood's requests waited.
    """

    calm_p99: float
    flood_p99: float
    flooder_p50: float
    busy: float


def fairness(seed: int) -> Fairness:
    """Run both."""
    calm = _calm(seed)
    begin, end = CALM_S / 2, CALM_S / 2 + FLOOD_S
    flood = _flood(seed, begin, len(calm))
    asks = sorted([*calm, *flood], key=lambda ask: ask.at)
    _, before = serve(OURS, Workload(tuple(calm)), seed)
    fleet, runs = serve(OURS, Workload(tuple(asks)), seed)
    drained = max(run.first_at for run in runs if run.ask.organization == FLOODER)
    watched = [run for run in before if begin <= run.ask.at < drained]
    others = [run for run in runs if run.ask.organization != FLOODER and begin <= run.ask.at < drained]
    flooder = sorted(run.ttft for run in runs if run.ask.organization == FLOODER)
    busy = sum(worker.busy_between(begin + 1, end) for worker in fleet.workers) / len(fleet.workers) / (end - begin - 1)
    return Fairness(_p99(watched), _p99(others), percentile(flooder, 0.5), busy)


def _p99(runs: list[Run]) -> float:
    return percentile(sorted(run.ttft for run in runs), 0.99)


def _calm(seed: int) -> list[Ask]:
    chance = random.Random(seed)
    choices = profiles((ORGANIZATIONS - 1) * PROFILES_EACH, PROFILE_TOKENS)
    owners = {profile: f"organization {number % (ORGANIZATIONS - 1)}" for number, profile in enumerate(choices)}
    asks: list[Ask] = []
    for number, (at, profile) in enumerate(
        zip(poisson(chance, CALM_RATE), zipf(chance, choices, EXPONENT), strict=False)
    ):
        if at > CALM_S:
            return asks
        asks.append(Ask(number, at, profile, chance.randint(*OWN_TOKENS), owners[profile]))
    raise AssertionError("arrivals never end")


def _flood(seed: int, begin: float, first: int) -> list[Ask]:
    chance = random.Random(f"flood {seed}")
    choices = profiles(PROFILES_EACH, PROFILE_TOKENS, label="flood")
    asks: list[Ask] = []
    for number, (at, profile) in enumerate(
        zip(poisson(chance, FLOOD_RATE), zipf(chance, choices, EXPONENT), strict=False)
    ):
        if at > FLOOD_S:
            return asks
        asks.append(
            replace(Ask(first + number, begin + at, profile, chance.randint(*OWN_TOKENS)), organization=FLOODER)
        )
    raise AssertionError("arrivals never end")
