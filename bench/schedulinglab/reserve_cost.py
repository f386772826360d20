"""What the queue's scripts cost Redis: time of a reservation with many lists and workers, and memory of many profiles.

Times are Redis's own: of its slow log, as the clock has it, and of its processor's time, which other programs on the machine
cannot lengthen. Neither the network nor this process is in them.
"""

from __future__ import annotations

import random
from contextlib import ExitStack

import redis

from bench.schedulinglab.figures import percentile
from bench.schedulinglab.running import fresh_redis
from bench.schedulinglab.workload import LINK_DIGITS
from tasks.queueing.keys import QueueKeys
from tasks.queueing.pull import Report, Wish, chain_text
from tasks.queueing.scripts import Scripts

LISTS, WORKERS, TIMED = 10_000, 64, 2_000
#: How many profiles each worker holds: on a GPU, and with tiers below it.
ON_GPU, WITH_TIERS = 64, 1_562
TOKENS, OWN_TOKENS, BASES = 6_000, 200, 100
LEAST_US = 20
MESSAGE = b"m" * 1_500


def reserve_cost(seed: int) -> dict[str, float]:
    """Return figures: microseconds of Redis's time, and bytes of its memory."""
    figures = _measure("reserve", seed, organizations=20, held=ON_GPU)
    figures |= _measure("reserve_one_organization", seed, organizations=1, held=ON_GPU)
    with_tiers = _measure("reserve_with_tiers", seed, organizations=20, held=WITH_TIERS)
    return figures | with_tiers


def _measure(name: str, seed: int, organizations: int, held: int) -> dict[str, float]:
    chance = random.Random(seed)
    with ExitStack() as closing:
        client = fresh_redis(closing)
        scripts = Scripts(client, QueueKeys("bench:"))
        before = _memory(client)
        for worker in range(WORKERS):
            numbers = range(worker * held, (worker + 1) * held)
            cache = {link: (tokens, tokens, tokens) for number in numbers for link, tokens in _links(number)}
            scripts.run("report", Report(_worker(worker), "1", 1, full=True, cache=cache).to_json())
        reported = _memory(client)
        for number in range(2 * LISTS):
            _put(scripts, number % LISTS, number, organizations)
        waiting = _memory(client)
        # The first call reads the script.
        scripts.run("reserve", _worker(0), Wish(_worker(0), room=0, budget=0).to_json())
        # Less is not logged, or the commands that the script is made of would be, and slow it down.
        client.config_set("slowlog-log-slower-than", LEAST_US)
        times: list[float] = []
        processor_s = 0.0
        for turn in range(TIMED):
            wish = Wish(_worker(chance.randrange(WORKERS)), room=4, budget=8_192, free_tokens=0).to_json()
            client.slowlog_reset()
            began_s = _processor_s(client)
            taken, _, _, _ = scripts.run("reserve", "holder", wish)
            processor_s += _processor_s(client) - began_s
            logged = client.slowlog_get(1)
            times.append(float(logged[0]["duration"]) if logged else float(LEAST_US))
            for index, _ in enumerate(taken):
                _put(scripts, chance.randrange(LISTS), 2 * LISTS + 8 * turn + index, organizations)
    times.sort()
    return {
        f"{name}_p50_us": percentile(times, 0.5),
        f"{name}_p99_us": percentile(times, 0.99),
        f"{name}_processor_us": processor_s / TIMED * 1e6,
        f"{name}_memory_a_profile_bytes": (reported - before) / (WORKERS * held),
        f"{name}_memory_a_request_bytes": (waiting - reported) / (2 * LISTS),
    }


def _put(scripts: Scripts, number: int, tag: int, organizations: int) -> None:
    *chain, (profile, _) = _links(number)
    organization = f"organization {number % organizations}"
    text = chain_text(tuple(chain))
    scripts.run("put", profile, f"{tag:035}:1", organization, TOKENS + OWN_TOKENS, 0, MESSAGE, TOKENS, text)


def _links(number: int) -> list[tuple[str, int]]:
    """Return a profile's inner link, which others share, and its own."""
    return [(f"{number % BASES:0{LINK_DIGITS}x}", TOKENS // 2), (f"{number:064x}", TOKENS)]


def _worker(number: int) -> str:
    return f"gpu@{number:03}"


def _memory(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


def _processor_s(client: redis.Redis) -> float:
    """Return the processor time that Redis's main thread has taken, with about 20 microseconds for asking."""
    told = client.info("cpu")
    return float(told["used_cpu_user_main_thread"]) + float(told["used_cpu_sys_main_thread"])
