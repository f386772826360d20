"""Copies of a profile follow its demand, by the queue's rule alone: more while a crowd asks for it, and evicted after that.

In virtual time, with the production scripts: four simulated workers, each with room for six profiles.
"""

from __future__ import annotations

import itertools
import random

import redis

from bench.schedulinglab.fleet import Fleet
from bench.schedulinglab.pull import Pull
from bench.schedulinglab.workload import Ask, Profile, poisson, profiles
from worker_gpu.engines.simulated_options import SimulationOptions

TOKENS, ROOM, WORKERS, BLOCK = 1_600, 6, 4, 16
#: A worker answers about 25 requests a second whose profile it has.
OPTIONS = SimulationOptions(
    num_blocks=ROOM * TOKENS // BLOCK,
    block_size=BLOCK,
    max_num_seqs=8,
    prefill_tokens_per_s=8_000,
    answer_tokens=(40, 80),
)
QUIET_RATE, CROWD_RATE = 8.0, 60.0
#: When the crowd comes, when it goes, and when the run ends, in seconds.
COMES, GOES, END = 5.0, 8.0, 20.0


def workload(crowd: Profile, others: list[Profile], seed: int) -> list[Ask]:
    """Return steady requests for all profiles, and the crowd's."""
    chance = random.Random(seed)
    quiet = [
        (at, chance.choice([crowd, *others]))
        for at in itertools.takewhile(lambda t: t < END, poisson(chance, QUIET_RATE))
    ]
    crowded = [
        (COMES + at, crowd) for at in itertools.takewhile(lambda t: t < GOES - COMES, poisson(chance, CROWD_RATE))
    ]
    drawn = sorted(quiet + crowded, key=lambda each: each[0])
    return [Ask(number, at, profile, 40) for number, (at, profile) in enumerate(drawn)]


def test_copies_follow_demand(redis_url: str) -> None:
    """One before the crowd, several while it lasts, and one or none when others have needed the room."""
    [crowd] = profiles(1, TOKENS, label="crowd")
    others = profiles(20, TOKENS)
    with redis.Redis.from_url(redis_url) as client:
        fleet = Fleet(Pull(client, "cache_aware_continuous"), WORKERS, OPTIONS)
        seen: dict[float, int] = {}

        def look(at: float) -> None:
            fleet.at(
                at, lambda: seen.update({at: sum(w.cached_tokens(crowd, "acme") >= TOKENS for w in fleet.workers)})
            )

        for tenth in range(int(END * 10)):
            look(tenth / 10)
        runs = fleet.serve(workload(crowd, others, seed=1))
    assert all(run.done_at < float("inf") for run in runs)
    before, during, after = (
        [count for at, count in seen.items() if begin <= at < end]
        for begin, end in ((0, COMES), (COMES, GOES), (END - 5, END))
    )
    assert max(before) <= 1
    assert max(during) >= 3
    assert sum(after) / len(after) < max(during) - 1
