"""Restoring: what a dead worker had comes back, and what a living one has does not."""

from __future__ import annotations

import random
import time
from typing import cast

import pytest

from tasks.queueing.leases import grace_s
from tests.tasks.queueing.broker import A, B, Broker, C, Consumer


def test_what_is_taken_is_leased(broker: Broker) -> None:
    """By the process that took it, since it was taken, by Redis' clock; its message is as it was published."""
    tag = broker.publish()
    message = broker.message(tag)
    Consumer(broker, holder="one").take(1)
    assert broker.message(tag) == message
    assert broker.client.hget(broker.keys.named("holders"), tag) == b"one"
    seconds, microseconds = broker.client.time()
    score = cast("float", broker.client.zscore(broker.keys.named("leases"), tag))
    assert 0 <= seconds + microseconds / 1e6 - score < 5


@pytest.mark.parametrize("how", ["ack", "reject", "requeue"])
def test_celery_cannot_end_a_lease(broker: Broker, how: str) -> None:
    """Whichever way Celery lets go of a message, it comes back when its lease ends, and not before."""
    consumer = Consumer(broker)
    tag = broker.publish()
    consumer.take(1)
    getattr(consumer.taken[0], how)()
    assert broker.leased == {tag}
    consumer.channel.qos.restore_visible()
    consumer.nothing_comes()
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert consumer.take(1) == [tag]


def test_dropping_a_lease_ends_the_message(broker: Broker) -> None:
    """Of several, that one; dropping it again is no error; it never comes back."""
    consumer = Consumer(broker)
    tags = [broker.publish() for _ in range(3)]
    consumer.take(3)
    for _ in range(2):
        broker.drop(tags[1])
        assert broker.leased == {tags[0], tags[2]}
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert sorted(consumer.take(2)) == sorted([tags[0], tags[2]])
    consumer.nothing_comes(0.1)


def test_a_renewed_lease_does_not_end(broker: Broker) -> None:
    """Of two that were about to end, the one that was renewed stays."""
    consumer = Consumer(broker, holder="one")
    kept, lost = broker.publish(), broker.publish()
    consumer.take(2)
    broker.end_leases()
    assert broker.scripts.run("renew", "one", kept) == [1]
    assert broker.restore() == 1
    assert consumer.take(1) == [lost]
    consumer.nothing_comes(0.1)
    assert broker.leased == {kept, lost}


def test_restoring_what_was_dropped_in_the_meantime(broker: Broker) -> None:
    """Nothing comes back; an index entry without a message is cleared away, and its neighbour is restored."""
    tag = broker.publish()
    Consumer(broker).take(1)
    broker.client.zadd(broker.keys.named("leases"), {b"left over": 1})
    broker.end_leases()
    assert broker.restore() == 1
    assert broker.leased == set()
    assert broker.waiting_tags(A) == [tag]


def test_nothing_ends_before_everybody_could_renew(broker: Broker) -> None:
    """Redis was away for longer than a lease, so nobody could renew: everybody may do so first."""
    tag = broker.publish()
    Consumer(broker).take(1)
    broker.end_leases()
    broker.client.delete(broker.keys.named("sweeps"))
    assert broker.restore() == 0
    broker.sweeping(grace_s(60) - 3)
    assert broker.restore() == 0
    broker.sweeping(grace_s(60) + 1)
    assert broker.restore() == 1
    assert broker.waiting_tags(A) == [tag]


@pytest.mark.parametrize("gap_s", [31, -5])
def test_a_gap_in_the_sweeps_begins_them_anew(broker: Broker, gap_s: float) -> None:
    """A gap, or a clock that was set back: how old a lease is says nothing then."""
    broker.publish()
    Consumer(broker).take(1)
    broker.end_leases()
    seconds, _ = broker.client.time()
    broker.client.hset(broker.keys.named("sweeps"), mapping={"last": seconds - gap_s, "since": seconds - 1000})
    assert broker.restore() == 0
    broker.sweeping(61)
    assert broker.restore() == 1


def test_a_sweep_is_bounded(broker: Broker) -> None:
    """It gives back so many at the most, the oldest leases first, and the next ones the rest."""
    tags = [broker.publish() for _ in range(5)]
    Consumer(broker).take(5)
    broker.end_leases()
    for back, left in ((2, 3), (2, 1), (1, 0)):
        assert broker.scripts.run("restore", 60, 2, 10) == back
        assert len(broker.leased) == left
        broker.check()
    assert sorted(broker.waiting_tags(A)) == sorted(tags)


def test_a_restored_message_is_the_oldest_of_its_profile(broker: Broker) -> None:
    """It has waited longest, and its profile has its turn next; an idle consumer is woken for it."""
    first = broker.publish(A)
    consumer = Consumer(broker, prefetch=1)
    consumer.take(1)
    later = [broker.publish(profile) for profile in (B, A)]
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert broker.waiting_tags(A) == [first, later[1]]
    assert Consumer(broker).take(3) == [first, *later]


def test_restored_messages_keep_their_order(broker: Broker) -> None:
    """A worker that dies with several messages of one profile turns nothing around."""
    tags = [broker.publish() for _ in range(4)]
    consumer = Consumer(broker)
    assert consumer.take(4) == tags
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert broker.waiting_tags(A) == tags


@pytest.mark.parametrize("lease_s", [1.0])
def test_a_dead_workers_messages_come_back_by_themselves(broker: Broker) -> None:
    """Without anybody asking: any consumer's sweep finds them soon after their lease has ended, and not before."""
    dead = Consumer(broker)
    tags = [broker.publish(profile) for profile in (A, B)]
    dead.take(2)
    began = time.monotonic()
    assert sorted(Consumer(broker).take(2, timeout_s=5)) == sorted(tags)
    assert 0.9 < time.monotonic() - began < 4


def test_many_leases_that_end_at_once(broker: Broker) -> None:
    """More than one sweep takes: a few sweeps restore them all."""
    tags = {broker.publish(random.choice((A, B, C))) for _ in range(250)}
    consumer = Consumer(broker, prefetch=0)
    consumer.take(250, timeout_s=20)
    broker.end_leases()
    for _ in range(3):
        consumer.connection.transport.cycle.maybe_restore_messages()
    assert broker.leased == set()
    assert {tag for profile in (A, B, C) for tag in broker.waiting_tags(profile)} == tags


@pytest.mark.parametrize("what", ["channel", "connection"])
@pytest.mark.parametrize("acknowledged", [True, False])
def test_closing_restores_nothing(broker: Broker, what: str, acknowledged: bool) -> None:
    """What a worker runs, it runs on: its connection's end is not its own."""
    consumer = Consumer(broker)
    tags = {broker.publish() for _ in range(2)}
    consumer.take(2)
    if acknowledged:
        consumer.taken[0].ack()
    (consumer.channel if what == "channel" else consumer.connection).close()
    assert broker.leased == tags
    assert broker.elements(A) == []
    Consumer(broker).nothing_comes()
