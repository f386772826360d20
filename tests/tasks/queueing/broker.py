"""The queue in a real Redis, as gateway and workers are configured for it: what the tests of this folder share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import kombu
import kombu.pools
import pytest
import redis

from tasks.app import configuration
from tasks.crypto import KEY_BYTES, KeyWrapper, Signer
from tasks.ids import new_request_id
from tasks.job import Job, Priority, Prompt, Sampling
from tasks.queueing.connecting import connect
from tasks.queueing.integrity import check_integrity
from tasks.queueing.keys import QueueKeys
from tasks.queueing.leases import Leases, grace_s
from tasks.queueing.message import MessageCodec, Queued
from tasks.queueing.properties import lease_tag
from tasks.queueing.publisher import Publisher
from tasks.queueing.scripts import Scripts
from tasks.settings import settings

WRAPPER = KeyWrapper((b"m" * KEY_BYTES,))
CODEC = MessageCodec(Signer((b"s" * KEY_BYTES,)), WRAPPER)
#: One profile hash a letter.
A, B, C, D = (letter * 64 for letter in "abcd")
POLL_S = 1.0  # kombu's own time-out of one blocking read.
TOKENS = 6000


def queued(
    profile: str = A,
    published_at: float | None = None,
    request_id: str | None = None,
    priority: Priority = "normal",
    organization: str = "acme",
) -> Queued:
    """Return the message of a new job."""
    request_id = request_id or new_request_id()
    data_key, wrapped = WRAPPER.new_key(request_id)
    job = Job(
        request_id=request_id,
        epoch=1,
        organization=organization,
        prompt=Prompt(profile, (1, 2, 3), TOKENS),
        sampling=Sampling(seed=7),
        published_at=time.time() if published_at is None else published_at,
        data_key=data_key,
        priority=priority,
    )
    return CODEC.encode(job, wrapped)


def milliseconds(turn: bytes) -> int:
    """Return a turn as the sums of a list have it, where there is no head start."""
    return math.floor(float(turn) * 1000)


class Broker:
    """The queue in one Redis."""

    def __init__(self, url: str, client: redis.Redis | None = None) -> None:
        self.configuration = configuration()
        self.queue = self.configuration["task_queues"][0]
        self.keys = QueueKeys(settings().gateway.key_prefix)
        self.client = client or redis.Redis.from_url(url)
        self.scripts = Scripts(self.client, self.keys)
        self.url = url
        self._publishing = connect(url, 5.0)
        self.publisher = Publisher(self._publishing, self.keys)
        self._open: list[Any] = []
        self._leases: list[Leases] = []

    def connection(self, holder: str = "") -> Any:
        """Return a new kombu connection, of process `holder` if it is another than this."""
        options = {**self.configuration["broker_transport_options"], "holder": holder}
        url, tls = self.configuration["broker_url"], self.configuration["broker_use_ssl"]
        self._open.append(kombu.Connection(url, ssl=tls, transport_options=options))
        return self._open[-1]

    def leases(self, holder: str, lease_s: float = 60.0) -> tuple[Leases, list[str]]:
        """Return started leases of process `holder`, and the list of the tags that it loses."""
        lost: list[str] = []
        leases = Leases(lambda: connect(self.url, 2.0), self.keys, holder, lease_s, lost.append)
        leases.start()
        self._leases.append(leases)
        return leases, lost

    def publish(self, profile: str = A, published_at: float | None = None, **facts: Any) -> str:
        """Publish a job as the gateway does, and return its message's delivery tag."""
        message = queued(profile, published_at, **facts)
        self.publisher.publish(message)
        return message.tag

    def grow_older(self, name: str, seconds: float) -> None:
        """Let the messages of a list have come so many seconds earlier, as if this test could wait for that."""
        for tag in self.waiting_tags(name):
            record = cast("bytes", self.client.hget(self.keys.named("messages"), tag))
            turn = record[2:].partition(b'"')[0]
            older = b"%.6f" % (float(turn) - seconds)
            self.client.hset(self.keys.named("messages"), tag, record.replace(turn, older, 1))
            self.client.lrem(self.keys.lists + name, 1, (turn + b" " + tag.encode()).decode())
            self.client.lpush(self.keys.lists + name, older + b" " + tag.encode())
            self.client.hincrby(self.keys.named("sums"), name, milliseconds(older) - milliseconds(turn))
        facts = cast("bytes", self.client.hget(self.keys.named("lists"), name))
        for ready in ("ready", f"ready:{facts.decode().split(chr(9), 3)[3]}"):
            self.client.zadd(self.keys.named(ready), {name: self.turns(name)[0]})

    @property
    def counted(self) -> int:
        """Return how many messages wait, as the counter has it."""
        return self.publisher.load().requests

    def elements(self, name: str) -> list[bytes]:
        """Return the elements of a list as they are: `<turn> <tag>`, the oldest first."""
        return cast("list[bytes]", self.client.lrange(self.keys.lists + name, 0, -1))[::-1]

    def turns(self, name: str) -> list[float]:
        """Return when the messages of a list have their turns."""
        return [float(element.split(b" ", 1)[0]) for element in self.elements(name)]

    def waiting_tags(self, name: str) -> list[str]:
        """Return the delivery tags of a list, the oldest first."""
        return [element.split(b" ", 1)[1].decode() for element in self.elements(name)]

    def message(self, tag: str) -> bytes:
        """Return the message of that tag as it was published."""
        record = cast("bytes", self.client.hget(self.keys.named("messages"), tag))
        return record.partition(b"\n")[2]

    @property
    def leased(self) -> set[str]:
        """Return the tags of all leased messages."""
        return {tag.decode() for tag in cast("list[bytes]", self.client.zrange(self.keys.named("leases"), 0, -1))}

    @property
    def delayed(self) -> set[str]:
        """Return the tags of all delayed messages."""
        return {tag.decode() for tag in cast("list[bytes]", self.client.zrange(self.keys.named("delayed"), 0, -1))}

    def hash(self, name: str) -> dict[str, str]:
        """Return one of the queue's hashes."""
        content = cast("dict[bytes, bytes]", self.client.hgetall(self.keys.named(name)))
        return {field.decode(): value.decode() for field, value in content.items()}

    @property
    def refused(self) -> list[bytes]:
        """Return what was set aside, the latest first."""
        return cast("list[bytes]", self.client.lrange(self.keys.named("refused"), 0, -1))

    def end_leases(self, *tags: str) -> None:
        """Let leases (all, if none is named) end now, as if they hadn't been renewed for too long, and be looked for."""
        lease_s = settings().scheduling.lease_s
        for tag in tags or self.leased:
            self.client.zincrby(self.keys.named("leases"), -lease_s - 1, tag)
        self.sweeping(lease_s + 1)

    def sweeping(self, for_s: float) -> None:
        """Let the sweeps have gone on for that long without a gap."""
        seconds, _ = self.client.time()
        self.client.hset(self.keys.named("sweeps"), mapping={"last": seconds, "since": seconds - for_s})

    def fall_due(self, *tags: str) -> None:
        """Let delayed messages be due, as if this test had waited."""
        for tag in tags or self.delayed:
            self.client.zadd(self.keys.named("delayed"), {tag: 1})

    def restore(self) -> int:
        """Sweep once; return how many messages came back."""
        lease_s = settings().scheduling.lease_s
        return int(self.scripts.run("restore", lease_s, 1000, grace_s(lease_s)))

    def drop(self, *tags: str) -> None:
        """End requests as a worker does."""
        self.scripts.run("drop", *tags)

    def check(self) -> None:
        """Check the invariant of the queue's keys."""
        assert check_integrity(self.client, self.keys) == []

    def close(self) -> None:
        """Close everything, at once: a connection that waits for Redis is cut there.

        That cuts those that kombu keeps for the whole process too: the next who asks for one is to get a new one.
        """
        for leases in self._leases:
            leases.close(0)
        with suppress(redis.RedisError):
            self.client.client_kill_filter(_type="normal", skipme=True)
        for connection in self._open:
            with suppress(Exception):
                connection.release()
        kombu.pools.reset()
        self._publishing.close()
        self.client.close()


@contextmanager
def configured(
    url: str, lease_s: float, monkeypatch: pytest.MonkeyPatch, client: redis.Redis | None = None
) -> Iterator[Broker]:
    """Configure the queue in the Redis at `url`. The test itself looks at it with `client`."""
    monkeypatch.setenv("REDIS_URL", url)
    monkeypatch.setenv("METAQORE_SCHEDULING__LEASE_S", str(lease_s))
    settings.cache_clear()
    made = Broker(url, client)
    try:
        yield made
    finally:
        made.close()


class Consumer:
    """A consumer of the queue `gpu`, which keeps what it gets."""

    def __init__(self, broker: Broker, prefetch: int = 100, connection: Any = None, holder: str = "") -> None:
        self.connection = connection or broker.connection(holder)
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
