"""No message is lost or run twice, whoever dies: consumers as Celery runs them, against a Redis that is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
from kombu.exceptions import OperationalError

from tasks.queueing.properties import lease_tag, record_of
from tests.services import RedisServer, wait_until
from tests.tasks.queueing.broker import A, B, Broker, C, Consumer, configured

ROOT = Path(__file__).parents[3]


class Worker:
    """A consumer in a thread of its own that connects anew after a connection error, as Celery's does.

    With `leases` it holds what it takes, and runs it until the test ends it.
    """

    def __init__(self, broker: Broker, holder: str, *, drop: bool) -> None:
        self.taken: Counter[str] = Counter()
        self.reconnects = 0
        self.error: BaseException | None = None
        self.leases, self.lost = broker.leases(holder, 1.0)
        self._holder = holder
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
        connection = self._broker.connection(self._holder)
        try:
            consumer = Consumer(self._broker, prefetch=1000, connection=connection)
            while not self._stop.is_set():
                consumer.poll()
                while consumer.taken:
                    message = consumer.taken.pop(0)
                    tag = lease_tag(message.delivery_tag)
                    self.leases.hold(tag, record_of(message))
                    self.taken[tag] += 1
                    if self._drop:
                        self.leases.drop(tag)
                    message.ack()
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
    with configured(own_redis.url, 1.0, monkeypatch) as broker, Worker(broker, "one", drop=True) as worker:
        for _ in range(3):
            for _ in range(pauses.randrange(20, 60)):
                published.add(broker.publish(pauses.choice((A, B, C))))
            wait_until(lambda: worker.taken, 10, "the first message")
            time.sleep(pauses.random() * 0.02)
            own_redis.kill()
            own_redis.start()
            published.add(broker.publish())
        wait_until(lambda: worker.error or published <= set(worker.taken), 20, "all messages")
        wait_until(lambda: worker.error or broker.publisher.unknown(published) == published, 20, "all drops")
        assert worker.error is None
        broker.check()
    assert set(worker.taken) == published


def test_a_redis_that_was_away_for_longer_than_a_lease(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could renew: when it is back, everybody may do so first, and nothing that runs is run again."""
    with configured(own_redis.url, 1.0, monkeypatch) as broker:
        tags = {broker.publish(profile) for profile in (A, B, A)}
        with Worker(broker, "one", drop=False) as worker, Worker(broker, "two", drop=False) as other:
            workers = (worker, other)
            wait_until(lambda: set(worker.taken) | set(other.taken) == tags, 10, "all messages")
            own_redis.kill()
            time.sleep(1.2)
            own_redis.start()
            tags.add(broker.publish(C))
            wait_until(lambda: {tag for one in workers for tag in one.taken} == tags, 20, "the new one")
            # Whatever is wrongly given back would be taken meanwhile.
            time.sleep(1.0)
            assert [one.error for one in workers] == [None, None]
            assert [one.lost for one in workers] == [[], []]
        assert worker.taken + other.taken == Counter(tags)
        assert broker.leased == tags
        broker.check()


def test_connections_are_killed_while_consuming(broker: Broker) -> None:
    """The consumer comes back each time, and what it holds is neither lost nor delivered a second time."""
    published: set[str] = set()
    with Worker(broker, "one", drop=False) as worker:
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
    assert worker.lost == []


def test_redis_becomes_a_replica(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it refuses then is a reason to connect anew, not to end; afterwards the consumer goes on."""
    with configured(own_redis.url, 60, monkeypatch) as broker, Worker(broker, "one", drop=False) as worker:
        first = broker.publish()
        wait_until(lambda: first in worker.taken, 10, "the first message")
        broker.client.replicaof("127.0.0.1", "1")
        wait_until(lambda: worker.error or worker.reconnects >= 2, 10, "the consumer to notice")
        broker.client.replicaof("NO", "ONE")
        second = broker.publish()
        wait_until(lambda: worker.error or second in worker.taken, 10, "the second message")
        assert worker.error is None
        assert worker.taken == Counter([first, second])


_TAKER = """
import sys, time
from tests.tasks.queueing.broker import Broker, Consumer
from tasks.queueing.properties import lease_tag, record_of
broker = Broker(sys.argv[1])
leases, lost = broker.leases(sys.argv[2], 1.0)
consumer = Consumer(broker, prefetch=0, holder=sys.argv[2])
while True:
    consumer.poll()
    for message in consumer.taken[:]:
        consumer.taken.remove(message)
        leases.hold(lease_tag(message.delivery_tag), record_of(message))
        print(lease_tag(message.delivery_tag), flush=True)
"""


@pytest.mark.parametrize("lease_s", [1.0])
def test_a_worker_is_killed(broker: Broker, redis_url: str) -> None:
    """With `kill -9`, between any two instructions: all that it had comes back after a lease, and once."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    process = subprocess.Popen([sys.executable, "-c", _TAKER, redis_url, "killed"], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        tags = {broker.publish() for _ in range(50)}
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 40)):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=10)
    had = broker.leased
    assert had
    began = time.monotonic()
    with Worker(broker, "one", drop=False) as worker:
        wait_until(lambda: worker.error or set(worker.taken) == tags, 20, "all messages")
        assert worker.error is None
        # A lease, a sweep that looks for ended ones four times in it, and the sweeps' own first lease.
        assert time.monotonic() - began < 15
    assert worker.taken == Counter(tags)
    assert broker.leased == tags


def test_a_channel_is_dropped_without_being_closed(broker: Broker) -> None:
    """Its socket goes as with its process: what it held stays leased, what it had not taken is there for others."""
    consumer = Consumer(broker, prefetch=1)
    held, waiting = broker.publish(), broker.publish()
    consumer.take(1)
    consumer.poll()
    consumer.channel.client.connection.disconnect()
    consumer.channel.pool.disconnect()
    assert broker.leased == {held}
    assert Consumer(broker, prefetch=1).take(1) == [waiting]
