"""How deep the queue is, as it is told: counted by priority, with the age of the oldest, in constant time."""

from __future__ import annotations

import time
from typing import cast

import pytest
import redis

from tasks.job import Priority
from tasks.queueing import depth as module
from tasks.queueing.depth import PRIORITIES, Depth, depth
from tasks.queueing.keys import list_name
from tests.tasks.queueing.broker import TOKENS, A, B, Broker, Consumer


def look(broker: Broker) -> Depth:
    """Return the depth of the queue."""
    return depth(broker.client, broker.keys)


def test_an_empty_queue(broker: Broker) -> None:
    """Nothing waits, and nothing is old."""
    seen = look(broker)
    assert seen == Depth(dict.fromkeys(PRIORITIES, 0), dict.fromkeys(PRIORITIES, 0.0), 0, 0, 0, 0.0)


def test_what_waits_is_counted_by_priority(broker: Broker) -> None:
    """From publishing to the end, through every place that a message may be in."""
    for priority, count in (("high", 1), ("normal", 2), ("low", 3)):
        for _ in range(count):
            broker.publish(A, priority=cast("Priority", priority))
    assert look(broker).requests == {"high": 1, "normal": 2, "low": 3}
    assert look(broker).tokens == 6 * TOKENS
    (tag,) = Consumer(broker, holder="one").take(1)
    seen = look(broker)
    assert (seen.requests["high"], seen.leased) == (0, 1)
    assert 0 <= seen.oldest_renewal_s < 60
    assert broker.scripts.run("give_back", "one", tag, 60, b"") == 1
    seen = look(broker)
    assert (seen.requests["high"], seen.leased, seen.delayed) == (1, 0, 1)
    broker.drop(tag)
    assert look(broker).requests == {"high": 0, "normal": 2, "low": 3}
    broker.check()


@pytest.mark.parametrize("priority", PRIORITIES)
def test_the_age_of_the_oldest(broker: Broker, priority: Priority) -> None:
    """It is since when it waits, whatever head start its priority has."""
    broker.publish(A, priority=priority)
    broker.publish(B, priority=priority)
    broker.grow_older(list_name(B, priority), 500)
    seen = look(broker)
    assert 500 <= seen.oldest_s[priority] < 560
    assert [seen.oldest_s[other] for other in PRIORITIES if other != priority] == [0, 0]


def test_one_that_is_behind_too_many_lists(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no older than the last list that was looked at would make it: what is told is that."""
    monkeypatch.setattr(module, "LISTS_AT_MOST", 2)
    for profile in ("a", "b", "c"):
        broker.publish(profile * 64, priority="high")
        broker.grow_older(list_name(profile * 64, "high"), 100)
    broker.publish(A, priority="low")
    seen = look(broker)
    assert 100 <= seen.oldest_s["high"] < 160
    # Its turn comes a minute late, and those of the others half a minute early.
    assert 100 + 30 + 60 <= seen.oldest_s["low"] < 100 + 90 + 60
    assert seen.requests == {"high": 3, "normal": 0, "low": 1}


def test_a_release_that_does_not_count_priorities(broker: Broker) -> None:
    """What it takes beside this one is counted too often until the queue is empty, and no longer."""
    tags = [broker.publish(A), broker.publish(A)]
    broker.client.hincrby(broker.keys.named("counts"), "priority normal", 5)
    assert look(broker).requests["normal"] == 7
    broker.drop(*tags)
    assert look(broker).requests["normal"] == 0
    broker.publish(A)
    assert look(broker).requests["normal"] == 1


def test_the_cost_does_not_grow_with_the_queue(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis reads a bounded number of lists, and none of what is in them."""
    monkeypatch.setattr(module, "LISTS_AT_MOST", 10)
    with broker.client.pipeline(transaction=False) as pipe:
        for number in range(2000):
            name = f"{number:064x}"
            pipe.zadd(broker.keys.named("ready"), {name: time.time()})
        pipe.execute()
    broker.client.config_resetstat()
    look(broker)
    calls = cast("dict[str, dict[str, int]]", broker.client.info("commandstats"))
    ours = ("cmdstat_info", "cmdstat_config", "cmdstat_config|resetstat")
    assert {name: each["calls"] for name, each in calls.items() if name not in ours} == {
        "cmdstat_time": 1,
        "cmdstat_hmget": 1,
        "cmdstat_zrange": 2,
        "cmdstat_zcard": 2,
    }
    broker.client.delete(broker.keys.named("ready"))


def test_a_queue_that_is_away(broker: Broker) -> None:
    """Whoever asks hears that."""
    away = redis.Redis(port=1, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    with pytest.raises(redis.ConnectionError):
        depth(away, broker.keys)
