"""Whether a flood by one organization reaches the others.

Ten organizations have so many profiles each. Nine of them ask at a calm pace. In the second run the tenth floods the queue midway,
for `FLOOD_S` seconds and with several times what the fleet can serve; the nine ask exactly as before. The flood's profiles are
cold, and they need room: with 15 profiles each, the fleet's cache has none to spare for it, with ten it has. The calm pace is 40 or
70 % of what the fleet can serve: the busier it is, the less of a flood is new to it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.schedulinglab.figures import percentile
from bench.schedulinglab.fleet import Run
from bench.schedulinglab.running import OURS, serve
from bench.schedulinglab.scenarios import EXPONENT, OPTIONS, OWN_TOKENS, PROFILE_TOKENS, Workload
from bench.schedulinglab.workload import Ask, poisson, profiles, zipf

ORGANIZATIONS = 10
FLOOD_RATE, CALM_S, FLOOD_S = 600.0, 40.0, 5.0
FLOODER = "flooder"


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison.

    Each organization has so many profiles; of one prompt, at most `threshold` tokens are computed in a step, where 0 is all; and the
    nine make so many requests in a second.
    """

    profiles_each: int
    threshold: int
    calm_rate: float
    seed: int


CASES = ((15, 0, 90), (15, 1024, 90), (10, 0, 90), (10, 512, 90), (15, 0, 160), (15, 1024, 160), (10, 512, 160))


@dataclass(frozen=True, slots=True)
class Fairness:
    """The others' 90th and 99th percentiles of the time to first token, in seconds, while nobody floods and while somebody does.

    `busy` is the share of the time that the workers computed while the flood's requests waited.
    """

    calm_p90: float
    calm_p99: float
    flood_p90: float
    flood_p99: float
    flooder_p50: float
    busy: float


def fairness(case: Case) -> Fairness:
    """Run both."""
    options = OPTIONS.model_copy(update={"long_prefill_token_threshold": case.threshold})
    calm = _calm(case)
    begin, end = CALM_S / 2, CALM_S / 2 + FLOOD_S
    flood = _flood(case, begin, len(calm))
    asks = sorted([*calm, *flood], key=lambda ask: ask.at)
    _, before = serve(OURS, Workload(tuple(calm)), case.seed, options)
    fleet, runs = serve(OURS, Workload(tuple(asks)), case.seed, options)
    drained = max(run.first_at for run in runs if run.ask.organization == FLOODER)
    watched = _waits(run for run in before if begin <= run.ask.at < drained)
    others = _waits(run for run in runs if run.ask.organization != FLOODER and begin <= run.ask.at < drained)
    flooder = _waits(run for run in runs if run.ask.organization == FLOODER)
    busy = sum(worker.busy_between(begin + 1, end) for worker in fleet.workers) / len(fleet.workers) / (end - begin - 1)
    return Fairness(
        calm_p90=percentile(watched, 0.9),
        calm_p99=percentile(watched, 0.99),
        flood_p90=percentile(others, 0.9),
        flood_p99=percentile(others, 0.99),
        flooder_p50=percentile(flooder, 0.5),
        busy=busy,
    )


def _waits(runs: Iterable[Run]) -> list[float]:
    return sorted(run.ttft for run in runs)


def _calm(case: Case) -> list[Ask]:
    chance = random.Random(case.seed)
    choices = profiles((ORGANIZATIONS - 1) * case.profiles_each, PROFILE_TOKENS)
    owners = {profile: f"organization {number % (ORGANIZATIONS - 1)}" for number, profile in enumerate(choices)}
    asks: list[Ask] = []
    for number, (at, profile) in enumerate(
        zip(poisson(chance, case.calm_rate), zipf(chance, choices, EXPONENT), strict=False)
    ):
        if at > CALM_S:
            return asks
        asks.append(Ask(number, at, profile, chance.randint(*OWN_TOKENS), owners[profile]))
    raise AssertionError("arrivals never end")


def _flood(case: Case, begin: float, first: int) -> list[Ask]:
    chance = random.Random(f"flood {case.seed}")
    choices = profiles(case.profiles_each, PROFILE_TOKENS, label="flood")
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
