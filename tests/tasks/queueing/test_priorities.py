"""Priorities: a list for each, and a head start that waiting makes up for."""

from __future__ import annotations

import random
import time

import pytest

from tasks.errors import MessageRejected
from tasks.job import Priority
from tasks.queueing.keys import HEAD_START_S, list_name
from tests.tasks.queueing.broker import CODEC, A, B, Broker, Consumer

PRIORITIES: tuple[Priority, ...] = ("low", "normal", "high")


def test_a_list_for_each_priority(broker: Broker) -> None:
    """Of one profile, so that each list is in the order of turns; and what is written to Redis says whose turn it is."""
    before = time.time()
    tags: dict[Priority, list[str]] = {word: [broker.publish(priority=word) for _ in range(2)] for word in PRIORITIES}
    for priority, expected in tags.items():
        name = list_name(A, priority)
        assert broker.waiting_tags(name) == expected
        assert all(abs(turn + HEAD_START_S[priority] - before) < 25 for turn in broker.turns(name))
    assert (list_name(A, "normal"), len({list_name(A, word) for word in PRIORITIES})) == (A, 3)
    assert broker.counted == 6


def test_high_before_normal_before_low(broker: Broker) -> None:
    """Whatever the order in which they came, and whichever profile they are for; within a class the first comes first."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    published: dict[Priority, list[str]] = {word: [] for word in PRIORITIES}
    for _ in range(40):
        priority = choose.choice(PRIORITIES)
        published[priority].append(broker.publish(choose.choice((A, B)), priority=priority))
    assert Consumer(broker).take(40) == [*published["high"], *published["normal"], *published["low"]]


@pytest.mark.parametrize(("ahead", "behind"), [("high", "normal"), ("normal", "low"), ("high", "low")])
def test_a_head_start_is_bounded(broker: Broker, ahead: Priority, behind: Priority) -> None:
    """A message that has waited longer than the other's head start is first: waiting wins in the end."""
    head_start_s = HEAD_START_S[ahead] - HEAD_START_S[behind]
    name = list_name(A, behind)
    patient = broker.publish(priority=behind)
    broker.grow_older(name, head_start_s + 5)
    hasty = broker.publish(priority=behind)
    favoured = broker.publish(priority=ahead)
    assert Consumer(broker).take(3) == [patient, favoured, hasty]


@pytest.mark.parametrize(("ahead", "behind"), [("high", "normal"), ("normal", "low")])
def test_a_head_start_holds_until_then(broker: Broker, ahead: Priority, behind: Priority) -> None:
    """A message that has waited for less than that is behind."""
    waiting = broker.publish(priority=behind)
    broker.grow_older(list_name(A, behind), HEAD_START_S[ahead] - HEAD_START_S[behind] - 5)
    favoured = broker.publish(priority=ahead)
    assert Consumer(broker).take(2) == [favoured, waiting]


@pytest.mark.parametrize("priority", PRIORITIES)
def test_a_restored_message_keeps_its_turn(broker: Broker, priority: Priority) -> None:
    """It goes back to the list of its priority, before what came after it."""
    first = broker.publish(priority=priority)
    consumer = Consumer(broker, prefetch=1)
    consumer.take(1)
    second = broker.publish(priority=priority)
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert broker.waiting_tags(list_name(A, priority)) == [first, second]
    low, high = broker.publish(priority="low"), broker.publish(priority="high")
    rest: dict[Priority, list[str]] = {
        "low": [high, first, second, low],
        "normal": [high, first, second, low],
        "high": [first, second, high, low],
    }
    assert Consumer(broker).take(4) == rest[priority]


def test_a_job_says_its_priority(broker: Broker) -> None:
    """The worker knows it; nobody can change it on the way."""
    broker.publish(priority="high")
    consumer = Consumer(broker)
    consumer.take(1)
    [envelope] = consumer.taken[0].payload[0]
    assert CODEC.decode(envelope).priority == "high"
    with pytest.raises(MessageRejected):
        CODEC.decode({**envelope, "priority": "low"})
