"""One reader for many clients: each gets every entry after its cursor, once, in order, however slow it is."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from gateway_app.streaming.feed import Entry, Subscription
from gateway_app.streaming.relay import BLOCK_S, Relay
from tasks.queueing.connecting import connect
from tasks.queueing.together import Together
from tasks.stream import FIELD, START, Cursor, stream_key
from tests.services import RedisServer, wait_until

PREFIX = "test:"
LIMIT = 8


@pytest.fixture
def relay(redis_url: str) -> Iterator[Relay]:
    """Return a relay with a small buffer."""
    relay = Relay(connect(redis_url, BLOCK_S + 15), Together(connect(redis_url, 15)), PREFIX, LIMIT)
    yield relay
    relay.close()


def write(client: redis.Redis, request_id: str, numbers: Iterator[int] | range) -> None:
    """Write entries 1-n to a stream."""
    for number in numbers:
        client.xadd(stream_key(PREFIX, request_id), {FIELD: str(number).encode()}, id=f"1-{number}")


def read(subscription: Subscription, count: int) -> list[Entry]:
    """Return the next `count` entries."""
    entries: list[Entry] = []
    while len(entries) < count:
        entry = subscription.next(10)
        assert entry is not None, f"only {len(entries)} of {count} entries came"
        entries.append(entry)
    return entries


def expected(numbers: range) -> list[Entry]:
    """Return the entries that `write` made."""
    return [(Cursor(1, number), str(number).encode()) for number in numbers]


def test_everyone_gets_what_comes_after_their_cursor(relay: Relay, redis_url: str) -> None:
    """Forty clients on five streams, from random cursors, while the streams are being written."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    client = redis.Redis.from_url(redis_url)
    streams = [uuid.uuid4().hex for _ in range(5)]
    for request_id in streams:
        write(client, request_id, range(1, 31))
    results: dict[int, tuple[int, list[Entry]]] = {}

    def watch(name: int, request_id: str, start: int) -> None:
        subscription = relay.subscribe(request_id, Cursor(1, start) if start else START)
        try:
            results[name] = start, read(subscription, 100 - start)
        finally:
            subscription.close()

    threads = [
        threading.Thread(target=watch, args=(name, choose.choice(streams), choose.randrange(60))) for name in range(40)
    ]
    for thread in threads:
        thread.start()
    for number in range(31, 101):
        for request_id in streams:
            write(client, request_id, range(number, number + 1))
    for thread in threads:
        thread.join(30)
    assert len(results) == 40
    for start, entries in results.values():
        assert entries == expected(range(start + 1, 101))


def test_redis_connections_do_not_grow_with_clients(relay: Relay, redis_url: str) -> None:
    """A hundred clients: the reader's connection and the one that wakes it."""
    client = redis.Redis.from_url(redis_url)

    def connections() -> int:
        listed: Any = client.client_list(_type="normal")
        return len(listed)

    before = connections()
    subscriptions = [relay.subscribe(uuid.uuid4().hex, START) for _ in range(100)]
    for subscription in subscriptions:
        assert subscription.next(0.001) is None
    assert connections() <= before + 2
    for subscription in subscriptions:
        subscription.close()


def test_a_slow_client_is_dropped_and_taken_up_again(relay: Relay, redis_url: str) -> None:
    """It holds a bounded number of entries, loses none, and a quick client beside it is not held up."""
    client = redis.Redis.from_url(redis_url)
    request_id = uuid.uuid4().hex
    slow, quick = relay.subscribe(request_id, START), relay.subscribe(request_id, START)
    assert slow.next(0.01) is None
    write(client, request_id, range(1, 201))
    assert read(quick, 200) == expected(range(1, 201))
    assert slow.held <= LIMIT + 1
    assert read(slow, 200) == expected(range(1, 201))


def test_redis_is_killed_and_comes_back(own_redis: RedisServer) -> None:
    """A watcher sees silence, and then what it has not seen yet."""
    relay = Relay(connect(own_redis.url, BLOCK_S + 15), Together(connect(own_redis.url, 15)), PREFIX, LIMIT)
    client = redis.Redis.from_url(own_redis.url)
    subscription = relay.subscribe("r", START)
    write(client, "r", range(1, 4))
    assert read(subscription, 3) == expected(range(1, 4))
    own_redis.kill()
    assert subscription.next(0.05) is None
    own_redis.start()
    wait_until(client.ping, 10, "redis")
    write(client, "r", range(4, 7))
    assert read(subscription, 3) == expected(range(4, 7))
    relay.close()


def test_a_client_that_comes_while_redis_is_away(own_redis: RedisServer) -> None:
    """It waits, and is served when Redis is back."""
    relay = Relay(connect(own_redis.url, BLOCK_S + 15), Together(connect(own_redis.url, 15)), PREFIX, LIMIT)
    write(redis.Redis.from_url(own_redis.url), "r", range(1, 3))
    own_redis.kill()
    subscription = relay.subscribe("r", START)
    assert subscription.next(0.05) is None
    own_redis.start()
    assert read(subscription, 2) == expected(range(1, 3))
    relay.close()
