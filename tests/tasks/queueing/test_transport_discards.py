"""Every way in which Celery or kombu would discard a message, or fall over one: nothing is lost, and no neighbour harmed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import kombu
import pytest
import redis
from celery import Celery

from tasks.app import configuration
from tasks.errors import QueueUnavailable
from tasks.queueing.keys import FAMILY
from tasks.queueing.properties import lease_tag
from tests.reserving import reserve_one
from tests.services import wait_until
from tests.tasks.queueing.broker import A, B, Broker, Consumer, queued

ROOT = Path(__file__).parents[3]

UNREADABLE: dict[str, bytes] = {
    "no JSON": b"no JSON",
    "not UTF-8": b"\xff\xfe\x00{",
    "NUL": b"\x00",
    "nothing": b"",
    "a number": b"7",
    "a list": b"[]",
    "no properties": b"{}",
    "properties of another type": b'{"properties": 7}',
    "properties without delivery information": b'{"properties": {}, "body": "x"}',
    "an unknown body encoding": b'{"properties": {"body_encoding": "rot13"}, "body": "x"}',
    "a body that is no base64": b'{"properties": {"body_encoding": "base64"}, "body": "*"}',
    "a body of another type": b'{"properties": {"body_encoding": "base64"}, "body": [1]}',
    "deeply nested": b"[" * 100_000,
    "a type that kombu cannot make": b'{"properties": {"x": {"__type__": "uuid", "__value__": "no"}}}',
    "huge": b"x" * 3_000_000,
}


@pytest.mark.parametrize("what", sorted(UNREADABLE))
def test_a_message_that_cannot_be_read(broker: Broker, what: str) -> None:
    """It is set aside; what came before it and after it is delivered, by the same consumer, without an error."""
    before, after = broker.publish(), None
    broker.scripts.run("put", A, "bad", "acme", 10, 0, UNREADABLE[what])
    after = broker.publish()
    consumer = Consumer(broker)
    taken = consumer.take(2 if what not in READABLE else 3)
    assert [tag for tag in taken if tag != "bad"] == [before, after]
    if what not in READABLE:
        [entry] = broker.refused
        assert entry.split(b"\n")[:2] != [b"", b""]
        assert b"bad" in entry
        assert len(entry) < 5000
        assert broker.publisher.unknown(["bad"]) == {"bad"}
    assert broker.leased == set(taken)


#: These have all that kombu needs. What Celery makes of them is the worker's affair.
READABLE = {"properties without delivery information", "a body that is no base64"}


@pytest.mark.parametrize(
    "element",
    [
        b"", b"\x00", b"\xff\xfe", b"rubbish", b"1.5", b"1.5 ", b"1.5 a b", b"x a", b" ", b"1.000000 unknown",
        b"9" * 400 + b".0 tag", b"-1.0 tag", b"1e5 tag", b"nan tag", b"\n\n", b"y" * 1_000_000,
        b'1795000000.000000 gw_1:1 {"the": "format of the release before"}',
    ],
)  # fmt: skip
def test_an_element_that_is_none(broker: Broker, element: bytes) -> None:
    """Whatever somebody writes into a list, at either end or in the middle of it, its neighbours survive it."""
    tags = [broker.publish(), broker.publish()]
    name = broker.keys.lists + A
    broker.client.lpush(name, element)
    broker.client.linsert(name, "AFTER", cast("Any", broker.elements(A)[1]), cast("Any", element))
    broker.client.rpush(name, element)
    tags.append(broker.publish(B))
    consumer = Consumer(broker)
    assert sorted(consumer.take(3)) == sorted(tags)
    consumer.nothing_comes(0.1)
    assert broker.leased == set(tags)
    assert len(broker.refused) in (0, 3)
    assert broker.client.exists(name) == 0


@pytest.mark.parametrize(
    "record", [b"", b"\n", b"no line", b"{}\nx", b"[1, 2, 3, 4]\nx", b'["1.5", "a", "b"]\nx', b'["x", "a", "b", 1]\n',
               b'["1.5", "a", "b", -1]\n', b'["1.5", "a", "b", 1e300]\n', b"\xff\n", b"[" * 50_000 + b"\n", b"\x00\n\x00"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["waiting", "delayed", "leased"])
def test_a_record_that_is_none(broker: Broker, record: bytes, place: str) -> None:
    """In whichever place a message is whose record somebody has written over, it goes, and its neighbours stay."""
    other = broker.publish()
    broker.client.hset(broker.keys.named("messages"), "bad", cast("Any", record))
    if place == "waiting":
        broker.client.rpush(broker.keys.lists + A, "1.500000 bad")
    else:
        broker.client.zadd(broker.keys.named("leases" if place == "leased" else "delayed"), {"bad": 1})
        broker.sweeping(61)
    broker.restore()
    consumer = Consumer(broker)
    assert consumer.take(1) == [other]
    consumer.nothing_comes(0.1)
    assert broker.publisher.unknown(["bad", other]) == {"bad"}
    assert broker.leased == {other}


def test_a_list_that_is_none(broker: Broker) -> None:
    """Somebody has made something else of it: what belongs there fails, changes nothing, and harms no other list."""
    held, waiting = broker.publish(A), broker.publish(B)
    Consumer(broker, prefetch=1).take(1)
    broker.client.set(broker.keys.lists + A, "text")
    broker.client.zadd(broker.keys.named("ready"), {A: 1})
    broker.end_leases()
    message = queued(A)
    with pytest.raises(QueueUnavailable):
        broker.publisher.publish(message)
    assert broker.publisher.unknown([message.tag]) == {message.tag}
    assert broker.restore() == 0
    assert broker.leased == {held}
    assert Consumer(broker).take(1) == [waiting]
    broker.client.delete(broker.keys.lists + A)
    assert broker.restore() == 1
    broker.publisher.publish(message)
    assert Consumer(broker).take(2) == [held, message.tag]


@pytest.mark.parametrize("delay_s", [None, 60])
def test_an_element_twice(broker: Broker, delay_s: float | None) -> None:
    """Somebody has doubled the element of a message in its list: while it is leased or delayed, it is not taken again."""
    tag = broker.publish()
    element = broker.elements(A)[0]
    broker.client.lpush(broker.keys.lists + A, element)
    consumer = Consumer(broker, holder="one")
    assert consumer.take(1) == [tag]
    if delay_s is not None:
        broker.client.lpush(broker.keys.lists + A, element)
        broker.client.zadd(broker.keys.named("ready"), {A: 1})
        assert broker.scripts.run("give_back", "one", tag, delay_s, b"") == 1
    consumer.nothing_comes(0.1)
    assert (broker.leased, broker.delayed) == (({tag}, set()) if delay_s is None else (set(), {tag}))


def test_a_message_of_another_name(broker: Broker) -> None:
    """A message that says it is another's is known by the name under which it was put: it cannot take a lease with it."""
    innocent = broker.publish()
    message = json.loads(broker.message(innocent))
    broker.scripts.run("put", A, "guilty", "acme", 10, 0, json.dumps(message))
    assert Consumer(broker).take(2) == [innocent, "guilty"]
    assert broker.leased == {innocent, "guilty"}


def test_a_message_for_nobody(broker: Broker) -> None:
    """Delivered where no consumer is any more, it comes back when its lease ends."""
    consumer = Consumer(broker)
    tag = broker.publish()
    channel = consumer.channel
    channel.connection._deliver(channel._get(FAMILY), "nobody")
    assert broker.leased == {tag}
    broker.end_leases()
    channel.restore_ended()
    assert consumer.take(1) == [tag]


def test_a_binding_that_is_gone(broker: Broker) -> None:
    """The routing of `gpu` is a constant: nothing of it is in Redis, so nothing of it can be lost or taken away."""
    consumer = Consumer(broker)
    channel = consumer.channel
    channel.queue_unbind(FAMILY, FAMILY, f"{FAMILY}.#")
    assert broker.client.keys("*binding.gpu*") == []
    producer = kombu.Producer(broker.connection(), exchange=broker.queue.exchange)
    producer.publish({"n": 1}, routing_key=f"{FAMILY}.{A}")
    assert consumer.take(1)


def test_sending_refused_messages_back_is_no_loop(broker: Broker) -> None:
    """However often Celery rejects and requeues, a message is delivered once a lease."""
    consumer = Consumer(broker)
    tag = broker.publish()
    consumer.take(1)
    consumer.taken[0].requeue()
    consumer.nothing_comes(0.3)
    assert broker.leased == {tag}


_WORKER = """
import sys
from celery import Celery
from tasks.app import configuration
from tasks.errors import QueueUnavailable
app = Celery("bare")
app.config_from_object({**configuration(), "imports": (), "worker_pool": "solo", "worker_concurrency": 2})
app.worker_main(["worker", "-Q", "gpu", "-n", "bare@here", "--loglevel", "WARNING", "-E"])
"""


def test_every_key_has_the_prefix(broker: Broker, redis_url: str) -> None:
    """A worker that consumed, answered remote control and sent events leaves nothing in Redis beside the prefix.

    Its task is not known to this bare worker: Celery rejects it, which loses nothing.
    """
    app = Celery("control")
    app.config_from_object({**configuration(), "imports": ()})
    tag = broker.publish()
    environment = {**os.environ, "REDIS_URL": redis_url}
    command = [sys.executable, "-c", _WORKER]
    seen: set[bytes] = set()

    def answers() -> bool:
        seen.update(cast("list[bytes]", broker.client.keys()))
        return bool(app.control.ping(timeout=0.3))

    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    try:
        wait_until(answers, 30, "the worker to answer")
        wait_until(lambda: broker.leased == {tag}, 10, "the message to be taken")
        seen.update(cast("list[bytes]", broker.client.keys()))
    finally:
        process.terminate()
        _, log = process.communicate(timeout=30)
        app.close()
    seen.update(cast("list[bytes]", broker.client.keys()))
    prefix = broker.keys.prefix.encode()
    assert {key for key in seen if not key.startswith(prefix)} == set()
    assert any(b"_kombu.binding" in key for key in seen)
    assert broker.leased == {tag}, log.decode()


@pytest.mark.parametrize("how", ["give_back", "restore"])
def test_what_comes_back_wakes_somebody(broker: Broker, how: str) -> None:
    """An idle worker hears of it at once."""
    tag = broker.publish()
    assert reserve_one(broker.scripts, "one") is not None
    broker.client.delete(broker.keys.wake)
    if how == "give_back":
        broker.scripts.run("give_back", "one", tag, 0, b"")
    else:
        broker.end_leases()
        assert broker.restore() == 1
    assert broker.client.llen(broker.keys.wake) == 1


def test_markers_are_lost_and_doubled(broker: Broker) -> None:
    """Whatever happens to the markers, everything is found within a poll."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    consumer = Consumer(broker)
    tags = []
    for _ in range(10):
        tags.append(broker.publish(chance.choice((A, B))))
        broker.client.delete(broker.keys.wake)
        if chance.random() < 0.5:
            broker.client.lpush(broker.keys.wake, *["1"] * chance.randrange(1, 9))
    assert sorted(consumer.take(10)) == sorted(tags)
    broker.client.delete(broker.keys.wake)


def test_a_delayed_message_is_found_within_a_poll(broker: Broker) -> None:
    """Nobody is woken when it falls due, but a blocking read ends at least every second."""
    consumer = Consumer(broker, holder="one")
    tag = broker.publish()
    consumer.take(1)
    assert broker.scripts.run("give_back", "one", tag, 0.2, b"") == 1
    began = time.monotonic()
    assert consumer.take(1) == [tag]
    assert 0.15 < time.monotonic() - began < 4
    assert lease_tag(consumer.taken[-1].delivery_tag) == tag


def test_a_script_that_fails_is_a_connection_error(broker: Broker) -> None:
    """Celery connects anew after one, where it would end after another error of Redis."""
    channel = Consumer(broker).channel
    for name in ("messages", "leases", "ready"):
        broker.client.set(broker.keys.named(name), "text")
    broker.sweeping(61)
    for ask in (
        lambda: channel._put(FAMILY, _celery_message()),
        lambda: channel._get(FAMILY),
        channel.restore_ended,
        channel.qos.restore_visible,
    ):
        with pytest.raises(redis.ConnectionError):
            ask()
    broker.client.flushall()


def _celery_message() -> dict[str, Any]:
    return {"body": "", "properties": {"delivery_tag": "tag", "delivery_info": {"routing_key": f"{FAMILY}.{A}"}}}
