"""What a worker counts of its cache, and what becomes of it while Redis is away."""

from __future__ import annotations

import asyncio
import time
from unittest.mock import patch

import pytest
import redis
from redis.asyncio import Redis

from tasks import cache_hits
from tasks.cache_hits import HOUR_S, Hits
from worker_gpu import hits
from worker_gpu.hits import HitCounter
from worker_gpu.profiles import StaticPart

BLOCK = 16
OWN, BASE = "a" * 64, "b" * 32
STATIC = StaticPart(range(100), ((BASE, 50),), "acme")


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    """Return a client of an empty Redis."""
    return redis.Redis.from_url(redis_url)


def read(client: redis.Redis) -> dict[str, Hits]:
    """Return what is counted by now of both links."""
    return cache_hits.read(client, "p:", [BASE, OWN], time.time())


async def tell(counter: HitCounter, url: str) -> None:
    """Add up in Redis what was counted."""
    async with Redis.from_url(url) as client:
        await counter.tell(client, "p:")


def test_each_link_is_counted(client: redis.Redis, redis_url: str) -> None:
    """It is a hit if all of a link was there, as far as it fills blocks; tokens beyond a link are not its own."""
    counter = HitCounter()
    for cached in (0, 32, 48, 95, 96, 112):
        counter.note(OWN, STATIC, cached, BLOCK)
    asyncio.run(tell(counter, redis_url))
    found = read(client)
    assert found[OWN].last == pytest.approx(time.time(), abs=60)
    assert (found[BASE].requests, found[BASE].hits, found[BASE].asked, found[BASE].found) == (
        6,
        4,
        300,
        0 + 32 + 48 + 150,
    )
    assert (found[OWN].requests, found[OWN].hits, found[OWN].asked, found[OWN].found) == (
        6,
        2,
        600,
        0 + 32 + 48 + 95 + 96 + 100,
    )
    assert found[OWN].rate == pytest.approx(371 / 600)
    # Nothing is said twice.
    asyncio.run(tell(counter, redis_url))
    assert read(client) == found


def test_what_fills_no_block_is_not_counted(client: redis.Redis, redis_url: str) -> None:
    """It could never be cached; a request without a profile has nothing that could."""
    counter = HitCounter()
    counter.note(OWN, StaticPart(range(BLOCK - 1)), 0, BLOCK)
    counter.note(OWN, StaticPart([]), 0, BLOCK)
    asyncio.run(tell(counter, redis_url))
    assert read(client)[OWN] == Hits()
    assert read(client)[OWN].rate is None
    assert client.keys("*") == []


def test_an_outage(client: redis.Redis, redis_url: str) -> None:
    """What could not be told is told later, with what came meanwhile."""
    counter = HitCounter()
    counter.note(OWN, STATIC, 0, BLOCK)
    with pytest.raises(redis.ConnectionError):
        asyncio.run(tell(counter, "redis://127.0.0.1:1/0"))
    counter.note(OWN, STATIC, 100, BLOCK)
    asyncio.run(tell(counter, redis_url))
    assert (read(client)[OWN].requests, read(client)[OWN].hits) == (2, 1)


def test_counts_are_bounded(client: redis.Redis, redis_url: str) -> None:
    """Of so many links in an outage; those that are counted already go on."""
    counter = HitCounter()
    with patch.object(hits, "_MAX_LINKS", 2):
        for name in (OWN, "c" * 64, OWN):
            counter.note(name, STATIC, 100, BLOCK)
    asyncio.run(tell(counter, redis_url))
    found = cache_hits.read(client, "p:", [BASE, OWN, "c" * 64], time.time())
    assert [each.requests for each in found.values()] == [3, 2, 0]


def test_many_links_are_told_in_parts(client: redis.Redis, redis_url: str) -> None:
    """Redis has others to answer in between; what could not be told of them is kept, and nothing is told twice."""
    counter = HitCounter()
    names = [f"{number:064x}" for number in range(5)]
    for name in names:
        counter.note(name, StaticPart(range(100)), 100, BLOCK)
    with patch.object(hits, "_AT_ONCE", 2), patch.object(cache_hits, "added", side_effect=cache_hits.added) as added:
        asyncio.run(tell(counter, redis_url))
    assert added.call_count == 3
    found = cache_hits.read(client, "p:", names, time.time())
    assert [each.requests for each in found.values()] == [1] * 5


def test_it_ends_by_itself(client: redis.Redis) -> None:
    """An hour's counts are kept while they are read: until the hour after it is over."""
    client.register_script(cache_hits.ADD)(*cache_hits.added("p:", {OWN: Hits(1, 1, 1, 1, 1.0)}, 10 * HOUR_S))
    assert client.ttl("p:cache-hits:10") == 2 * HOUR_S
    asked = {at: cache_hits.read(client, "p:", [OWN], at * HOUR_S)[OWN].requests for at in (9, 10, 11, 12)}
    assert asked == {9: 0, 10: 1, 11: 1, 12: 0}
    assert cache_hits.read(client, "p:", [], 0.0) == {}
