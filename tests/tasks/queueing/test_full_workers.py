"""Workers that have no room for what waits leave it, and leave one another in peace."""

from __future__ import annotations

import redis

from tasks.queueing.keys import QueueKeys
from tasks.queueing.pull import Wish
from tasks.queueing.scripts import Scripts

KEYS = QueueKeys("metaqore:")


def wish(worker: str, *, room: int = 60, budget: int = 2_000, in_flight: int = 6_000, load: int = 6_000) -> str:
    """Return a wish, by default of a worker that computes a long prompt."""
    return Wish(worker, room, budget, in_flight, load).to_json()


def test_workers_that_are_full_do_not_wake_each_other_for_ever(redis_url: str) -> None:
    """Each is woken at most once, while the request fits none of them; and one that has room is woken for it."""
    with redis.Redis.from_url(redis_url) as client:
        scripts, workers = Scripts(client, KEYS), ["one", "other"]
        for worker in workers:
            scripts.run("reserve", worker, wish(worker, budget=8_000, in_flight=0, load=0))
        scripts.run("put", "a" * 64, "request:1", "acme", 6_200, 0, b"message", 6_000, "")
        asked = 0
        while woken := [worker for worker in workers if client.lpop(KEYS.wake_of(worker))]:
            for worker in woken:
                assert scripts.run("reserve", worker, wish(worker))[0] == []
                asked += 1
                assert asked <= len(workers)
        assert client.llen(KEYS.wake) == 0
        assert scripts.run("reserve", "third", wish("third", budget=8_000, in_flight=0))[0][0][0] == b"request:1"


def test_what_a_worker_was_just_given_counts_when_the_next_is_woken(redis_url: str) -> None:
    """Else whoever was idle when it asked last would be woken for everything that comes."""
    with redis.Redis.from_url(redis_url) as client:
        scripts, workers = Scripts(client, KEYS), ["one", "other"]
        for worker in workers:
            scripts.run("reserve", worker, wish(worker, budget=8_000, in_flight=0, load=0))
        woken = []
        for number in range(2):
            scripts.run("put", f"{number:064}", f"request:{number}", "acme", 100, 0, b"message", 0, "")
            [worker] = [worker for worker in workers if client.lpop(KEYS.wake_of(worker))]
            assert len(scripts.run("reserve", worker, wish(worker, budget=8_000, in_flight=0, load=0))[0]) == 1
            woken.append(worker)
        assert sorted(woken) == workers
