"""No message is lost or run twice by the queue, whoever dies: through kombu itself, against a real Redis.

Whatever Celery does to a `gpu` message ends in one of the calls made here: it consumes, acknowledges, rejects, closes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import Empty
from typing import Any, Self, cast

import kombu
import pytest
import redis
from kombu.exceptions import OperationalError
from redis.asyncio import Redis as AsyncRedis

from tasks.app import configuration, make_app
from tasks.crypto import KEY_BYTES, KeyWrapper, Signer
from tasks.errors import MessageRejected, QueueFull, QueueUnavailable
from tasks.ids import new_request_id
from tasks.job import Job, Priority, Prompt, Sampling
from tasks.queueing.keys import FAMILY, HEAD_START_S, QueueKeys, list_name
from tasks.queueing.leases import Leases
from tasks.queueing.message import MessageCodec
from tasks.queueing.publisher import Publisher, connect
from tasks.queueing.transport import lease_tag
from tasks.settings import settings
from tests.services import RedisServer, wait_until

WRAPPER = KeyWrapper((b"m" * KEY_BYTES,))
CODEC = MessageCodec(Signer((b"s" * KEY_BYTES,)), WRAPPER)
#: One profile hash a letter.
A, B, C, D = (letter * 64 for letter in "abcd")
POLL_S = 1.0  # kombu's own time-out of one blocking read.


class Broker:
    """The queue in one Redis, as gateway and workers are configured for it."""

    def __init__(self, url: str) -> None:
        self.configuration = configuration()
        self.queue = self.configuration["task_queues"][0]
        self.keys = QueueKeys(settings().gateway.key_prefix)
        self.client = redis.Redis.from_url(url)
        self.url = url
        self._publishing = connect(url, 5.0)
        self.publisher = Publisher(self._publishing, self.keys, CODEC)
        self._open: list[Any] = []

    def connection(self) -> Any:
        """Return a new kombu connection."""
        options = self.configuration["broker_transport_options"]
        self._open.append(kombu.Connection(self.configuration["broker_url"], transport_options=options))
        return self._open[-1]

    def publish(
        self,
        profile: str = A,
        published_at: float | None = None,
        request_id: str | None = None,
        priority: Priority = "normal",
    ) -> str:
        """Publish a job as the gateway does, and return its message's delivery tag."""
        request_id = request_id or new_request_id()
        data_key, wrapped = WRAPPER.new_key(request_id)
        job = Job(
            request_id=request_id,
            epoch=1,
            organization="acme",
            prompt=Prompt(profile, (1, 2, 3), 6000),
            sampling=Sampling(seed=7),
            published_at=time.time() if published_at is None else published_at,
            data_key=data_key,
            priority=priority,
        )
        self.publisher.publish(job, wrapped)
        return f"{request_id}:1"

    def grow_older(self, name: str, seconds: float) -> None:
        """Let the messages of a list have come so many seconds earlier, as if this test could wait for that."""
        aged = [element.split(b" ", 1) for element in self.elements(name)]
        self.client.delete(self.keys.lists + name)
        for turn, rest in aged:
            self.client.lpush(self.keys.lists + name, b"%.6f " % (float(turn) - seconds) + rest)
        self.client.zadd(self.keys.ready, {name: self.turns(name)[0]})

    @property
    def counted(self) -> int:
        """Return how many messages wait, as the counter has it."""
        return int(cast("bytes | None", self.client.get(self.keys.waiting)) or 0)

    def elements(self, profile: str) -> list[bytes]:
        """Return the elements of a profile's list as they are: `<time> <tag> <message>`, the oldest first."""
        return cast("list[bytes]", self.client.lrange(self.keys.lists + profile, 0, -1))[::-1]

    def turns(self, name: str) -> list[float]:
        """Return when the messages of a list have their turns."""
        return [float(element.split(b" ", 1)[0]) for element in self.elements(name)]

    def waiting(self, profile: str) -> list[bytes]:
        """Return the messages of a profile's list, the oldest first."""
        return [element.split(b" ", 2)[2] for element in self.elements(profile)]

    def waiting_tags(self, profile: str) -> list[str]:
        """Return the delivery tags of a profile's list, the oldest first."""
        return [element.split(b" ", 2)[1].decode() for element in self.elements(profile)]

    @property
    def leased(self) -> set[str]:
        """Return the tags of all leased messages, having checked that both of a lease's keys agree."""
        held = {tag.decode() for tag in cast("list[bytes]", self.client.hkeys(self.keys.leased))}
        indexed = {tag.decode() for tag in cast("list[bytes]", self.client.zrange(self.keys.leases, 0, -1))}
        assert held == indexed
        return held

    def end_leases(self, *tags: str) -> None:
        """Let leases (all, if none is named) end now, as if they hadn't been renewed for too long."""
        for tag in tags or self.leased:
            self.client.zincrby(self.keys.leases, -settings().scheduling.lease_s - 1, tag)

    def drop(self, tag: str) -> None:
        """End a request as a worker does."""
        self.with_leases(lambda leases: leases.drop(tag))

    def with_leases(self, work: Callable[[Leases], Any]) -> None:
        """Do something to leases on an asyncio client of its own."""

        async def run() -> None:
            async with AsyncRedis.from_url(self.url) as client:
                await work(Leases(client, self.keys))

        asyncio.run(run())

    def close(self) -> None:
        """Close everything, at once: a connection that waits for Redis is cut there."""
        with suppress(redis.RedisError):
            self.client.client_kill_filter(_type="normal", skipme=True)
        for connection in self._open:
            with suppress(Exception):
                connection.release()
        self._publishing.close()
        self.client.close()


class Consumer:
    """A consumer of the queue `gpu`, which keeps what it gets."""

    def __init__(self, broker: Broker, prefetch: int = 100, connection: Any = None) -> None:
        self.connection = connection or broker.connection()
        self.taken: list[Any] = []
        self.consumer = self.connection.Consumer([broker.queue], on_message=self.taken.append)
        self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()

    @property
    def channel(self) -> Any:
        """Return kombu's channel."""
        return self.consumer.channel

    @property
    def tags(self) -> list[str]:
        """Return the delivery tags of what was taken, in order."""
        return [lease_tag(message.delivery_tag) for message in self.taken]

    def poll(self, timeout_s: float = 0.05) -> None:
        """Let kombu work for a moment."""
        with suppress(TimeoutError):
            self.connection.drain_events(timeout=timeout_s)

    def take(self, count: int, timeout_s: float = 5.0) -> list[str]:
        """Return the tags of the next `count` messages, once they have come."""
        before = len(self.taken)
        deadline = time.monotonic() + timeout_s
        while len(self.taken) < before + count:
            assert time.monotonic() < deadline, f"{len(self.taken) - before} of {count} messages came"
            self.poll()
        return self.tags[before:]

    def nothing_comes(self, for_s: float = 0.2) -> None:
        """Check that no message is delivered in that time."""
        before = len(self.taken)
        deadline = time.monotonic() + for_s
        while time.monotonic() < deadline:
            self.poll()
        assert self.tags[before:] == []

    def in_a_blocking_read(self) -> None:
        """Return once the consumer waits in Redis, where the next marker will reach it."""
        self.nothing_comes(0.1)
        assert self.channel._in_poll


@pytest.fixture
def lease_s() -> float:
    """Return the length of a lease, in seconds; tests that need a short one override it."""
    return 60.0


@pytest.fixture
def broker(redis_url: str, lease_s: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    """Return the queue in an empty Redis."""
    with _configured(redis_url, lease_s, monkeypatch) as made:
        yield made


@contextmanager
def _configured(url: str, lease_s: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setenv("METAQORE_SCHEDULING__LEASE_S", str(lease_s))
    settings.cache_clear()
    made = Broker(url)
    try:
        yield made
    finally:
        made.close()


# --- Publishing and taking ------------------------------------------------------------------------


def test_one_list_a_profile_and_one_queue(broker: Broker) -> None:
    """Messages lie in their profile's list; a consumer of `gpu` gets them all, and nothing is left but the leases."""
    tags = {profile: [broker.publish(profile) for _ in range(3)] for profile in (A, B, C)}
    for profile, expected in tags.items():
        assert broker.waiting_tags(profile) == expected
    ready = cast("list[bytes]", broker.client.zrange(broker.keys.ready, 0, -1))
    assert {profile.decode() for profile in ready} == {A, B, C}
    assert broker.client.llen(broker.keys.wake) == 1
    consumer = Consumer(broker)
    taken = consumer.take(9)
    assert sorted(taken) == sorted(tag for expected in tags.values() for tag in expected)
    assert set(taken) == broker.leased
    assert [broker.waiting(profile) for profile in (A, B, C)] == [[], [], []]
    assert broker.client.exists(broker.keys.ready) == 0


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
    app = make_app()
    args: list[Any] = [{"empty": [], "nothing": None, "text": "ü"}]
    try:
        first = app.send_task("metaqore.generate", args=args, exchange=FAMILY, routing_key=f"{FAMILY}.{A}")
        second = app.send_task("metaqore.generate", args=args, queue=FAMILY)
        third = app.send_task("metaqore.generate", args=args)
    finally:
        app.pool.force_close_all()
        app.close()
    assert len(broker.waiting(A)) == 1
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
    assert len(broker.waiting(B)) == 1
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
    with _configured(own_redis.url, 60, monkeypatch) as broker:
        own_redis.kill()
        with pytest.raises(QueueUnavailable):
            broker.publish()
        with pytest.raises(QueueUnavailable):
            broker.publisher.check()
        own_redis.start()
        broker.publisher.check()
        tag = broker.publish()
        assert broker.waiting_tags(A) == [tag]


# --- Priorities -----------------------------------------------------------------------------------


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


# --- How many may wait ----------------------------------------------------------------------------


def bounded(broker: Broker, most: int) -> Publisher:
    """Return a publisher for a queue in which only so many may wait; the broker publishes with it from now on."""
    broker.publisher = Publisher(broker._publishing, broker.keys, CODEC, most)
    return broker.publisher


def test_a_full_queue(broker: Broker) -> None:
    """No more than may wait are taken, whatever their priority; what was refused has left nothing."""
    publisher = bounded(broker, 3)
    tags = []
    for priority in PRIORITIES:
        publisher.check()
        tags.append(broker.publish(priority=priority))
    for priority in PRIORITIES:
        with pytest.raises(QueueFull):
            broker.publish(B, priority=priority)
    with pytest.raises(QueueFull):
        publisher.check()
    assert broker.counted == 3
    assert broker.client.exists(*(broker.keys.lists + list_name(B, word) for word in PRIORITIES)) == 0
    consumer = Consumer(broker, prefetch=1)
    assert consumer.take(1) == [tags[2]]
    publisher.check()
    broker.publish(B)
    with pytest.raises(QueueFull):
        broker.publish(B)


def test_what_a_lost_worker_had_counts_again(broker: Broker) -> None:
    """It comes back even where the queue is full: it was accepted long ago."""
    bounded(broker, 2)
    first = broker.publish()
    consumer = Consumer(broker, prefetch=1)
    consumer.take(1)
    later = [broker.publish(), broker.publish()]
    broker.end_leases()
    consumer.channel.qos.restore_visible()
    assert broker.waiting_tags(A) == [first, *later]
    assert broker.counted == 3
    with pytest.raises(QueueFull):
        broker.publish()
    assert Consumer(broker).take(3) == [first, *later]
    assert broker.counted == 0


def test_no_bound(broker: Broker) -> None:
    """Zero is for any number."""
    publisher = bounded(broker, 0)
    for _ in range(20):
        broker.publish()
        publisher.check()
    assert broker.counted == 20


def test_publishing_at_once(broker: Broker) -> None:
    """Of thirty that publish at once into a queue with room for ten, ten get in."""
    bounded(broker, 10)
    barrier = threading.Barrier(30)

    def publish(_number: int) -> bool:
        barrier.wait(30)
        try:
            broker.publish()
        except QueueFull:
            return False
        return True

    with ThreadPoolExecutor(30) as threads:
        assert sum(threads.map(publish, range(30))) == 10
    assert (broker.counted, len(broker.waiting(A))) == (10, 10)


def test_what_was_never_counted_is_not_counted_off(broker: Broker) -> None:
    """Neither rubbish that somebody put into a list, nor messages that are older than the counter: publishing goes on."""
    publisher = bounded(broker, 5)
    broker.client.lpush(broker.keys.lists + A, b"rubbish")
    tags = [broker.publish(), broker.publish()]
    consumer = Consumer(broker)
    assert consumer.take(2) == tags
    consumer.nothing_comes(0.1)
    assert broker.counted == 0
    for _ in range(3):
        broker.publish()
    broker.client.delete(broker.keys.waiting)
    consumer.take(3)
    assert broker.counted == 0
    tag = broker.publish()
    publisher.check()
    assert (broker.counted, consumer.take(1)) == (1, [tag])


# --- Credit ---------------------------------------------------------------------------------------


def test_never_more_than_prefetch(broker: Broker) -> None:
    """What a worker has no room for stays in Redis, where others can take it."""
    for _ in range(10):
        broker.publish()
    consumer = Consumer(broker, prefetch=3)
    consumer.take(3)
    consumer.nothing_comes()
    assert len(broker.leased) == 3
    assert len(broker.waiting(A)) == 7


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


# --- Leases ---------------------------------------------------------------------------------------


def test_what_is_taken_is_leased(broker: Broker) -> None:
    """The lease holds the message as it was published, and the time it was taken by Redis' clock."""
    tag = broker.publish()
    element = broker.elements(A)[0]
    Consumer(broker).take(1)
    assert broker.client.hget(broker.keys.leased, tag) == f"{len(A)}:{A}".encode() + element
    seconds, microseconds = broker.client.time()
    score = cast("float", broker.client.zscore(broker.keys.leases, tag))
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
    consumer = Consumer(broker)
    kept, lost = broker.publish(), broker.publish()
    consumer.take(2)
    broker.end_leases()
    broker.with_leases(lambda leases: leases.renew([kept]))
    consumer.channel.qos.restore_visible()
    assert consumer.take(1) == [lost]
    consumer.nothing_comes(0.1)
    assert broker.leased == {kept, lost}


def test_renewing_revives_nothing(broker: Broker) -> None:
    """A lease that was dropped, or never was, isn't made by renewing it; renewing none is no error."""
    consumer = Consumer(broker)
    tag = broker.publish()
    consumer.take(1)
    broker.drop(tag)
    broker.with_leases(lambda leases: leases.renew([tag, "unknown"]))
    broker.with_leases(lambda leases: leases.renew([]))
    assert broker.leased == set()


def test_restoring_what_was_dropped_in_the_meantime(broker: Broker) -> None:
    """Nothing comes back; an index entry without a message is cleared away."""
    channel = Consumer(broker).channel
    broker.client.zadd(broker.keys.leases, {"left over": 1})
    channel.qos.restore_visible()
    assert broker.leased == set()
    assert broker.client.exists(broker.keys.ready) == 0


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
    assert broker.waiting(A) == []
    Consumer(broker).nothing_comes()


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
        keys = [broker.keys.lists + A, broker.keys.ready, broker.keys.wake, broker.keys.waiting]
        channel._run(channel._put_script, keys, [A, "tag-1", raw, 0, 0])
        for _ in range(3):
            assert broker.waiting(A) == [raw]
            taken = channel._get(FAMILY)
            taken["properties"]["delivery_tag"] = lease_tag(taken["properties"]["delivery_tag"])
            assert taken == message
            assert cast("bytes", broker.client.hget(broker.keys.leased, "tag-1")).endswith(b" tag-1 " + raw)
            broker.end_leases()
            channel.qos.restore_visible()
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


class Worker:
    """A consumer in a thread of its own that connects anew after a connection error, as Celery's does."""

    def __init__(self, broker: Broker, drop: bool) -> None:
        self.taken: Counter[str] = Counter()
        self.reconnects = 0
        self.error: BaseException | None = None
        self._broker = broker
        self._drop = drop
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._consume()
        except BaseException as error:  # the test's own thread shows it
            self.error = error

    def _consume(self) -> None:
        connection = self._broker.connection()
        try:
            consumer = Consumer(self._broker, prefetch=1000, connection=connection)
            while not self._stop.is_set():
                consumer.poll()
                while consumer.taken:
                    message = consumer.taken[0]
                    if self._drop:
                        pipe = self._broker.client.pipeline()
                        pipe.hdel(self._broker.keys.leased, lease_tag(message.delivery_tag))
                        pipe.zrem(self._broker.keys.leases, lease_tag(message.delivery_tag))
                        pipe.execute()
                    message.ack()
                    self.taken[lease_tag(consumer.taken.pop(0).delivery_tag)] += 1
        except (*connection.connection_errors, OperationalError):
            self.reconnects += 1
            self._stop.wait(0.05)
        finally:
            with suppress(*connection.connection_errors):
                connection.collect()


def test_redis_is_killed_while_consuming(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times, while messages are published and taken: the consumer comes back by itself and none is missing."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    pauses = random.Random(seed)
    published: set[str] = set()
    with _configured(own_redis.url, 1.0, monkeypatch) as broker, Worker(broker, drop=True) as worker:
        for _ in range(3):
            for _ in range(pauses.randrange(20, 60)):
                published.add(broker.publish(pauses.choice((A, B, C))))
            wait_until(lambda: worker.taken, 10, "the first message")
            time.sleep(pauses.random() * 0.02)
            own_redis.kill()
            own_redis.start()
            published.add(broker.publish())
        wait_until(lambda: worker.error or published <= set(worker.taken), 20, "all messages")
        assert worker.error is None
    assert set(worker.taken) == published


def test_connections_are_killed_while_consuming(broker: Broker) -> None:
    """The consumer comes back each time, and what it holds is neither lost nor delivered a second time."""
    published: set[str] = set()
    with Worker(broker, drop=False) as worker:
        for killed in range(1, 4):
            published.update([broker.publish(profile) for profile in (A, B, A)])
            wait_until(lambda: worker.error or published <= set(worker.taken), 10, "all messages")
            broker.client.client_kill_filter(_type="normal", skipme=True)
            wait_until(lambda times=killed: worker.error or worker.reconnects >= times, 10, "the consumer to notice")  # type: ignore[misc]
        published.add(broker.publish())
        wait_until(lambda: worker.error or published <= set(worker.taken), 10, "the last message")
        assert worker.error is None
    assert worker.taken == Counter(published)
    assert broker.leased == published


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


# --- Anything in any order ------------------------------------------------------------------------


LISTS: dict[str, tuple[str, Priority]] = {
    list_name(profile, priority): (profile, priority) for profile in (A, B) for priority in PRIORITIES
}


@pytest.mark.parametrize("round_number", range(4))
def test_index_and_lists_agree_after_anything(broker: Broker, round_number: int) -> None:
    """After every single step of 150 random ones, lists, leases, index, counter and marker are what a plain model says."""
    seed = random.randrange(2**32)
    print(f"round {round_number}, seed {seed}")
    choose = random.Random(seed)
    most = choose.choice([0, 8])
    bounded(broker, most)
    channel = Consumer(broker).channel
    waiting: dict[str, list[str]] = {name: [] for name in LISTS}
    held: dict[str, str] = {}
    for _ in range(150):
        step = choose.choices(["put", "reserve", "restore", "drop", "steal marker"], [6, 6, 3, 3, 1])[0]
        if step == "put":
            name = choose.choice(sorted(LISTS))
            profile, priority = LISTS[name]
            if 0 < most <= sum(map(len, waiting.values())):
                with pytest.raises(QueueFull):
                    broker.publish(profile, priority=priority)
            else:
                waiting[name].append(broker.publish(profile, priority=priority))
        elif step == "reserve":
            first = cast("list[bytes]", broker.client.zrange(broker.keys.ready, 0, 0))
            if not first:
                with pytest.raises(Empty):
                    channel._get(FAMILY)
                continue
            name = first[0].decode()
            tag = lease_tag(channel._get(FAMILY)["properties"]["delivery_tag"])
            assert tag == waiting[name].pop(0)
            held[tag] = name
            if waiting[name]:
                assert broker.client.zscore(broker.keys.ready, name) == broker.turns(name)[0]
        elif step == "restore" and held:
            tag = choose.choice(sorted(held))
            assert channel.restore_ended() == 0
            broker.end_leases(tag)
            assert channel.restore_ended() == 1
            waiting[held.pop(tag)].insert(0, tag)
        elif step == "drop" and held:
            tag = choose.choice(sorted(held))
            pipe = broker.client.pipeline()
            pipe.hdel(broker.keys.leased, tag)
            pipe.zrem(broker.keys.leases, tag)
            pipe.execute()
            del held[tag]
        elif step == "steal marker":
            broker.client.delete(broker.keys.wake)
            continue
        _check(broker, waiting, held, channel)


def _check(broker: Broker, waiting: dict[str, list[str]], held: dict[str, str], channel: Any) -> None:
    for name, tags in waiting.items():
        assert broker.waiting_tags(name) == tags
    index = cast("list[tuple[bytes, float]]", broker.client.zrange(broker.keys.ready, 0, -1, withscores=True))
    turns = {name: broker.turns(name) for name, tags in waiting.items() if tags}
    assert {indexed.decode() for indexed, _ in index} == set(turns)
    for indexed, turn in index:
        # Leases that end one after the other may turn messages around; then the oldest of them speaks for the list.
        own = turns[indexed.decode()]
        assert min(own) <= turn <= own[0]
    assert broker.leased == set(held)
    assert broker.client.llen(broker.keys.wake) <= 1
    assert channel._size(FAMILY) == sum(map(len, waiting.values()))
    assert broker.counted == sum(map(len, waiting.values()))


def test_there_is_a_marker_while_something_waits(broker: Broker) -> None:
    """Whoever takes the marker and a message leaves a marker for the next, and the last one leaves none behind."""
    for profile in (A, B, B):
        broker.publish(profile)
    channel = Consumer(broker).channel
    for left in (2, 1, 0):
        broker.client.delete(broker.keys.wake)
        channel._get(FAMILY)
        assert broker.client.llen(broker.keys.wake) == min(left, 1)


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


def test_a_message_that_is_not_json(broker: Broker) -> None:
    """Whatever somebody writes into a list, its neighbours survive it."""
    tags = [broker.publish(), broker.publish(B)]
    broker.client.lpush(broker.keys.lists + A, b"no JSON")
    channel = Consumer(broker).channel
    for _ in range(4):
        with suppress(Exception):
            channel._get(FAMILY)
    assert broker.leased == set(tags)


def test_a_routing_key_with_a_quotation_mark(broker: Broker) -> None:
    """Whatever a producer's routing key is, its message comes back when its lease ends, and so do all others."""
    producer = broker.connection().Producer()
    producer.publish({"n": 1}, exchange=broker.queue.exchange, routing_key='gpu.a"b', declare=[broker.queue])
    tags = {broker.publish()}
    consumer = Consumer(broker)
    tags.update(consumer.take(2))
    broker.end_leases()
    with suppress(ValueError):
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
    assert len(broker.waiting(A)) == 1
