"""The situations that a rule is judged in.

Eight workers, each of which the documented constants of an 8B model on one H100 describe, but for the size of the cache:
it has room for 24 profiles of 6,000 tokens, so that the fleet's is 1.28 times what 150 profiles need, running answers
not counted. Which profile a request asks for is drawn by Zipf's law with exponent 0.9, arrivals are a Poisson process, a
request's own part is 100 to 300 tokens long, an answer 24 to 320.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bench.schedulinglab.workload import Ask, Profile, poisson, profiles, zipf
from worker_gpu.engines.simulated_options import SimulationOptions

WORKERS = 8
PROFILES, PROFILE_TOKENS, ROOM = 150, 6_000, 24
EXPONENT = 0.9
OWN_TOKENS = 100, 300
OPTIONS = SimulationOptions(num_blocks=ROOM * PROFILE_TOKENS // SimulationOptions().block_size)
#: What a new profile takes to be computed, in seconds.
COMPUTE_S = PROFILE_TOKENS / OPTIONS.prefill_tokens_per_s
CROWD_S = 10.0


@dataclass(frozen=True)
class Workload:
    """What happens in a run: requests in the order of arrival, and (time, worker) of each worker that dies.

    `crowd` is the profile that a crowd asks for, if there is one.
    """

    asks: tuple[Ask, ...]
    losses: tuple[tuple[float, int], ...] = ()
    crowd: Profile | None = None


#: Makes a workload from a rate in requests a second, a number of requests, and a seed.
Scenario = Callable[[float, int, int], Workload]


def many_profiles(rate: float, count: int, seed: int) -> Workload:
    """150 profiles: more than one worker holds, and nearly as many as all of them do."""
    return _steady(rate, count, seed, profiles(PROFILES, PROFILE_TOKENS))


def few_profiles(rate: float, count: int, seed: int) -> Workload:
    """20 profiles: each worker could hold them all."""
    return _steady(rate, count, seed, profiles(20, PROFILE_TOKENS))


def one_profile(rate: float, count: int, seed: int) -> Workload:
    """One profile that everybody asks for."""
    return _steady(rate, count, seed, profiles(1, PROFILE_TOKENS))


def flash_crowd(rate: float, count: int, seed: int) -> Workload:
    """150 profiles; for ten seconds, half of all traffic asks for one that is new."""
    [crowd] = profiles(1, PROFILE_TOKENS, label="crowd")
    begin = 0.5 * count / rate
    chance = random.Random(f"crowd {seed}")

    def joins(now: float, profile: Profile) -> Profile:
        return crowd if begin <= now < begin + CROWD_S and chance.random() < 0.5 else profile

    return Workload(_steady(rate, count, seed, profiles(PROFILES, PROFILE_TOKENS), joins).asks, crowd=crowd)


def shared_bases(rate: float, count: int, seed: int) -> Workload:
    """270 profiles on ten bases: the first half of each is one of ten, so the fleet's cache is 1.37 times what all need."""
    half = PROFILE_TOKENS // 2
    made = [Profile(((f"base {number % 10}", half), (f"role {number}", half))) for number in range(270)]
    return _steady(rate, count, seed, made)


def worker_lost(rate: float, count: int, seed: int) -> Workload:
    """150 profiles, of which seven workers hold nearly as much as there is room for: one dies midway, and stays away."""
    made = _steady(rate, count, seed, profiles(120, PROFILE_TOKENS))
    return Workload(made.asks, losses=((0.5 * count / rate, WORKERS // 2),))


def new_version(rate: float, count: int, seed: int) -> Workload:
    """150 profiles; midway the ten that are asked for most get a new version at once, and nobody warms it up."""
    olds = profiles(PROFILES, PROFILE_TOKENS)
    news = dict(zip(olds[:10], profiles(10, PROFILE_TOKENS, label="new"), strict=True))
    change = 0.5 * count / rate
    return _steady(
        rate, count, seed, olds, lambda now, profile: news.get(profile, profile) if now >= change else profile
    )


#: Each with the rates it is run at unless others are asked for, in requests a second.
SCENARIOS: dict[str, Scenario] = {
    function.__name__: function
    for function in (many_profiles, few_profiles, one_profile, flash_crowd, shared_bases, worker_lost, new_version)
}


def _steady(
    rate: float,
    count: int,
    seed: int,
    choices: list[Profile],
    change: Callable[[float, Profile], Profile] = lambda _now, profile: profile,
) -> Workload:
    chance = random.Random(seed)
    arrivals: Iterator[float] = poisson(chance, rate)
    drawn: Iterable[tuple[float, Profile]] = zip(arrivals, zipf(chance, choices, EXPONENT), strict=False)
    return Workload(
        tuple(
            Ask(number, at, change(at, profile), chance.randint(*OWN_TOKENS))
            for number, (at, profile) in enumerate(itertools.islice(drawn, count))
        )
    )
