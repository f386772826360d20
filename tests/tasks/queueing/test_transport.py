"""What kombu and Celery make of the `gpu` queue: publishing, taking and letting go, against a real Redis.

Whatever Celery does to a `gpu` message ends in one of the calls made here: it consumes, acknowledges, rejects, closes.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections import Counter
from typing import Any, cast

import kombu
import pytest
import redis

from tasks.app import make_app
from tasks.errors import QueueUnavailable
from tasks.job import Prompt, Sampling
from tasks.queueing.keys import FAMILY
from tasks.queueing.properties import lease_tag
from tests.services import RedisServer
from tests.tasks.queueing.broker import CODEC, POLL_S, A, B, Broker, C, Consumer, D, configured

# --- Publishing and taking ------------------------------------------------------------------------


def test_one_list_a_profile_and_one_queue(broker: Broker) -> None:
    """Messages lie in their profile's list; a consumer of `gpu` gets them all, and nothing is left but the leases."""
    tags = {profile: [broker.publish(profile) for _ in range(3)] for profile in (A, B, C)}
    for profile, expected in tags.items():
        assert broker.waiting_tags(profile) == expected
    ready = cast("list[bytes]", broker.client.zrange(broker.keys.named("ready"), 0, -1))
    assert {profile.decode() for profile in ready} == {A, B, C}
    assert broker.client.llen(broker.keys.wake) == 1
    consumer = Consumer(broker)
    taken = consumer.take(9)
    assert sorted(taken) == sorted(tag for expected in tags.values() for tag in expected)
    assert set(taken) == broker.leased
    assert [broker.elements(profile) for profile in (A, B, C)] == [[], [], []]
    assert broker.client.exists(broker.keys.named("ready")) == 0


def test_a_workers_job_is_the_gateways(broker: Broker) -> None:
    """What kombu gives to a consumer decodes to the job that was published, as Celery's only argument."""
    tag = broker.publish(B)
    consumer = Consumer(broker)
    consumer.take(1)
    args, kwargs, _ = consumer.taken[0].payload
    job = CODEC.decode(*args)
    assert kwargs == {}
    assert f"{job.request_id}:{job.epoch}" == tag
    assert (job.prompt, job.sampling) == (Prompt(B, (1, 2, 3), 6000), Sampling(seed=7))
    assert consumer.taken[0].headers["id"] == job.request_id
    assert consumer.taken[0].headers["task"] == "metaqore.generate"


def test_the_oldest_profile_first_and_in_order_within_one(broker: Broker) -> None:
    """With one clock this is the order of publishing."""
    tags = [broker.publish(profile) for profile in (B, A, A, C, B, A, D, A, C)]
    assert Consumer(broker).take(9) == tags


def test_a_gateway_whose_clock_is_wrong(broker: Broker) -> None:
    """The order in which Redis got the messages decides, not what the gateways' clocks say."""
    ahead_s = 3600
    tags = [broker.publish(A, time.time() + ahead_s), broker.publish(A, time.time() + ahead_s)]
    tags += [broker.publish(profile) for profile in (B, C, B)]
    assert Consumer(broker).take(5) == tags


def test_a_message_reaches_an_idle_consumer_at_once(broker: Broker) -> None:
    """The marker wakes it: it doesn't wait for the next poll."""
    consumer = Consumer(broker)
    consumer.in_a_blocking_read()
    tag = broker.publish()
    began = time.monotonic()
    assert consumer.take(1) == [tag]
    assert time.monotonic() - began < POLL_S / 2


def test_several_consumers_share_the_work(broker: Broker) -> None:
    """Each message goes to one of them."""
    consumers = [Consumer(broker) for _ in range(3)]
    tags = [broker.publish(random.choice((A, B, C))) for _ in range(30)]
    deadline = time.monotonic() + 10
    while sum(len(consumer.taken) for consumer in consumers) < 30 and time.monotonic() < deadline:
        for consumer in consumers:
            consumer.poll(0.01)
    assert Counter(tag for consumer in consumers for tag in consumer.tags) == Counter(tags)


def test_a_message_published_by_celery(broker: Broker) -> None:
    """`send_task` with a routing key, and with the queue's name alone, which has no hash: both arrive."""
    args: list[Any] = [{"empty": [], "nothing": None, "text": "ü"}]
    with make_app() as app:
        first = app.send_task("metaqore.generate", args=args, exchange=FAMILY, routing_key=f"{FAMILY}.{A}")
        second = app.send_task("metaqore.generate", args=args, queue=FAMILY)
        third = app.send_task("metaqore.generate", args=args)
    assert len(broker.elements(A)) == 1
    consumer = Consumer(broker)
    consumer.take(3)
    assert [message.headers["id"] for message in consumer.taken] == [first.id, second.id, third.id]
    assert all(message.payload[0] == args for message in consumer.taken)
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert len(consumer.take(3)) == 3


def test_a_message_published_by_kombu(broker: Broker) -> None:
    """A plain producer's message is one like any other: leased, restored, and in its profile's list."""
    producer = broker.connection().Producer()
    producer.publish({"n": 1}, exchange=broker.queue.exchange, routing_key=f"{FAMILY}.{B}", declare=[broker.queue])
    assert len(broker.elements(B)) == 1
    consumer = Consumer(broker)
    tag = consumer.take(1)[0]
    assert consumer.taken[0].payload == {"n": 1}
    consumer.taken[0].ack()
    broker.end_leases(tag)
    consumer.channel.qos.restore_visible()
    assert consumer.take(1) == [tag]


def test_other_queues_are_kombus_own(broker: Broker) -> None:
    """A consumer of `gpu` and of another queue gets both; the other's messages are acknowledged as ever."""
    connection = broker.connection()
    other = kombu.Queue("other", kombu.Exchange("other", type="direct"), routing_key="other")
    consumer = Consumer(broker, connection=connection)
    consumer.consumer.add_queue(other)
    consumer.consumer.consume()
    connection.Producer(connection.channel()).publish({"n": 1}, exchange="other", routing_key="other", declare=[other])
    tag = broker.publish()
    consumer.take(2)
    others = [message for message in consumer.taken if message.delivery_info["exchange"] == "other"]
    assert [message.payload for message in others] == [{"n": 1}]
    unacked = f"{broker.keys.prefix}unacked"
    assert broker.client.hkeys(unacked) == [others[0].delivery_tag.encode()]
    for message in consumer.taken:
        message.ack()
    assert broker.client.exists(unacked, f"{unacked}_index") == 0
    assert broker.leased == {tag}


def test_recovering_gives_other_queues_messages_back(broker: Broker) -> None:
    """For these kombu's promise is kept: what was not acknowledged is delivered again when somebody asks for it."""
    connection = broker.connection()
    other = kombu.Queue("other", kombu.Exchange("other", type="direct"), routing_key="other")
    consumer = Consumer(broker, connection=connection)
    consumer.consumer.add_queue(other)
    consumer.consumer.consume()
    connection.Producer(connection.channel()).publish({"n": 1}, exchange="other", routing_key="other", declare=[other])
    tag = broker.publish()
    consumer.take(2)
    consumer.consumer.recover(requeue=True)
    assert broker.leased == {tag}
    assert len(consumer.take(1)) == 1
    assert consumer.taken[-1].payload == {"n": 1}


def test_size(broker: Broker) -> None:
    """The queue's size is that of all lists; what is leased doesn't wait."""
    channel = broker.connection().default_channel
    assert channel._size(FAMILY) == 0
    for profile in (A, B, B, C):
        broker.publish(profile)
    assert channel._size(FAMILY) == 4
    assert channel.queue_declare(FAMILY).message_count == 4
    Consumer(broker, prefetch=1).take(1)
    assert channel._size(FAMILY) == 3


def test_the_queue_cannot_be_purged(broker: Broker) -> None:
    """`celery purge` would lose requests without a record; neither it nor deleting the queue takes anything."""
    channel = Consumer(broker, prefetch=1).channel
    tags = [broker.publish(profile) for profile in (A, B)]
    with pytest.raises(NotImplementedError):
        channel.queue_purge(FAMILY)
    channel.queue_delete(FAMILY)
    assert broker.waiting_tags(A) + broker.waiting_tags(B) == tags


def test_publishing_while_redis_is_away(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails with the error callers know, and works again when Redis is back."""
    with configured(own_redis.url, 60, monkeypatch) as broker:
        own_redis.kill()
        for ask in (
            broker.publish,
            lambda: broker.publisher.room("acme", 1),
            lambda: broker.publisher.unknown(["tag"]),
            broker.publisher.load,
        ):
            with pytest.raises(QueueUnavailable):
                ask()
        broker.publisher.withdraw("tag")
        broker.publisher.stop("id")
        own_redis.start()
        broker.publisher.room("acme", 1)
        tag = broker.publish()
        assert broker.waiting_tags(A) == [tag]


# --- Credit ---------------------------------------------------------------------------------------


def test_never_more_than_prefetch(broker: Broker) -> None:
    """What a worker has no room for stays in Redis, where others can take it."""
    for _ in range(10):
        broker.publish()
    consumer = Consumer(broker, prefetch=3)
    consumer.take(3)
    consumer.nothing_comes()
    assert len(broker.leased) == 3
    assert len(broker.elements(A)) == 7


@pytest.mark.parametrize("how", ["ack", "reject", "requeue"])
def test_each_way_of_letting_go_returns_one_credit(broker: Broker, how: str) -> None:
    """One message more is taken for each that Celery is done with, one way or the other."""
    for _ in range(6):
        broker.publish()
    consumer = Consumer(broker, prefetch=2)
    consumer.take(2)
    for expected in (3, 4, 5):
        getattr(consumer.taken[expected - 3], how)()
        consumer.take(1)
        consumer.nothing_comes(0.1)
        assert len(broker.leased) == len(consumer.taken) == expected


def test_other_consumers_get_what_a_full_one_cannot_take(broker: Broker) -> None:
    """Also where the full one has swallowed the marker."""
    full = Consumer(broker, prefetch=1)
    broker.publish()
    full.take(1)
    tags = [broker.publish() for _ in range(2)]
    full.poll()
    assert Consumer(broker).take(2, timeout_s=2 * POLL_S) == tags


def test_the_message_is_never_written_anew(broker: Broker) -> None:
    """Byte for byte the same when published, leased, restored, and leased again: an empty list stays a list."""
    message = {
        "body": base64.b64encode(b"[[], {}, {}]").decode(),
        "content-type": "application/json",
        "headers": {"empty": [], "nested": [[], {}, [{}]], "null": None, "text": 'ü \u2028 😀 / \\ " ', "deep": {}},
        "properties": {
            "delivery_tag": "tag-1", "delivery_info": {"exchange": FAMILY, "routing_key": f"{FAMILY}.{A}"},
            "large": 2**63 + 1, "small": 1e-7, "exact": 1795000000.1234567, "body_encoding": "base64", "list": [],
        },
    }  # fmt: skip
    channel = Consumer(broker, prefetch=1).channel
    for dumped in (json.dumps(message), json.dumps(message, ensure_ascii=False, indent=1)):
        raw = dumped.encode()
        broker.scripts.run("put", A, "tag-1", 'organization " \n / ü', 7, 0, raw)
        for times in range(3):
            taken = channel._get(FAMILY)
            properties = taken["properties"]
            assert properties.pop("record").partition(b"\n")[2] == raw == broker.message("tag-1")
            assert properties.pop("returns") == times
            assert json.loads(properties.pop("decision"))["candidates"][0]["profile"] == A
            properties["delivery_tag"] = lease_tag(properties["delivery_tag"])
            assert taken == message
            broker.end_leases()
            channel.qos.restore_visible()
            broker.check()
        channel._get(FAMILY)
        broker.drop("tag-1")


# --- Failures -------------------------------------------------------------------------------------


def test_a_lost_marker_costs_one_poll(broker: Broker) -> None:
    """Without the marker the message is found when the blocking read times out."""
    tag = broker.publish()
    broker.client.delete(broker.keys.wake)
    began = time.monotonic()
    assert Consumer(broker).take(1, timeout_s=3 * POLL_S) == [tag]
    assert time.monotonic() - began < 2 * POLL_S


def test_flushed_scripts_and_data(broker: Broker) -> None:
    """After FLUSHALL and SCRIPT FLUSH, publisher and consumer go on as if nothing had been."""
    consumer = Consumer(broker)
    broker.publish()
    consumer.take(1)
    broker.client.flushall()
    broker.client.script_flush()
    tag = broker.publish(B)
    assert consumer.take(1) == [tag]
    assert broker.leased == {tag}


def test_a_dead_channel_is_a_connection_error(broker: Broker) -> None:
    """Whatever Celery still asks of a channel whose connection has gone: it hears what makes it connect anew.

    An AttributeError, as kombu's own channel raises, would end the worker.
    """
    consumer = Consumer(broker)
    broker.publish()
    consumer.take(1)
    channel = consumer.channel
    consumer.connection.collect()
    for ask in (channel.qos.restore_visible, lambda: channel._get(FAMILY), lambda: channel._size(FAMILY)):
        with pytest.raises(redis.ConnectionError):
            ask()
    consumer.taken[0].ack()


# --- What broke it once -------------------------------------------------------------------------------


def test_a_marker_that_comes_after_the_consumer_was_cancelled(broker: Broker) -> None:
    """`celery control cancel_consumer gpu` leaves a blocking read behind: its reply is no message and harms nothing."""
    consumer = Consumer(broker)
    consumer.in_a_blocking_read()
    consumer.consumer.cancel()
    tag = broker.publish()
    consumer.nothing_comes()
    assert broker.waiting_tags(A) == [tag]
    assert Consumer(broker).take(1, timeout_s=2 * POLL_S) == [tag]


def test_acknowledging_a_message_that_was_delivered_twice(broker: Broker) -> None:
    """A worker that lost its lease and got the message again acknowledges both: the lease of the second stays."""
    consumer = Consumer(broker)
    tag = broker.publish()
    consumer.take(1)
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert consumer.take(1) == [tag]
    consumer.taken[0].ack()
    other = broker.publish()
    consumer.take(1)
    consumer.taken[1].ack()
    assert broker.leased == {tag, other}


def test_a_routing_key_with_a_quotation_mark(broker: Broker) -> None:
    """Whatever a producer's routing key is, its message comes back when its lease ends, and so do all others."""
    producer = broker.connection().Producer()
    producer.publish({"n": 1}, exchange=broker.queue.exchange, routing_key='gpu.a"b', declare=[broker.queue])
    tags = {broker.publish()}
    consumer = Consumer(broker)
    tags.update(consumer.take(2))
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert set(consumer.take(2, timeout_s=1)) == tags


@pytest.mark.parametrize("acknowledged", [True, False])
def test_a_message_sent_through_the_default_exchange(broker: Broker, acknowledged: bool) -> None:
    """Sent to the queue by its name, it is a message like any other, and comes back when its lease ends."""
    broker.connection().Producer().publish({"n": 1}, routing_key=FAMILY)
    consumer = Consumer(broker)
    tag = consumer.take(1)[0]
    if acknowledged:
        consumer.taken[0].ack()
    assert broker.leased == {tag}
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert consumer.take(1, timeout_s=1.5) == [tag]


def test_recover(broker: Broker) -> None:
    """AMQP's way of asking for everything again must not lose anything here."""
    consumer = Consumer(broker)
    tag = broker.publish()
    consumer.take(1)
    consumer.consumer.recover(requeue=True)
    assert tag in broker.leased or tag in broker.waiting_tags(A)


def test_closing_takes_nothing(broker: Broker) -> None:
    """What waits when a consumer closes is there for the others, at once."""
    consumer = Consumer(broker)
    consumer.in_a_blocking_read()
    tag = broker.publish()
    consumer.channel.close()
    assert broker.leased == set()
    assert broker.waiting_tags(A) == [tag]


def test_a_producer_after_redis_has_lost_its_data(broker: Broker) -> None:
    """The routing of `gpu` is a constant: it must not depend on a key that can be lost."""
    producer = broker.connection().Producer()
    options = {"exchange": broker.queue.exchange, "routing_key": f"{FAMILY}.{A}", "declare": [broker.queue]}
    producer.publish({"n": 1}, **options)
    broker.client.flushall()
    producer.publish({"n": 2}, **options)
    assert len(broker.elements(A)) == 1
