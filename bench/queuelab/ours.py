"""Our queue: messages go in by the Publisher, and come out by its own script or through our transport for kombu."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import kombu
import redis

from bench.queuelab.messages import BLOCK, Messages
from tasks.app import configuration
from tasks.queueing.keys import QueueKeys, script
from tasks.queueing.publisher import Publisher
from tasks.queueing.scripts import Scripts
from tests.reserving import reserve_one

POURED = 1_000
HOLDER = "bench"


class Ours:
    """A queue of ours below a prefix of its own, with some messages in each of so many lists."""

    def __init__(self, client: redis.Redis, prefix: str, messages: Messages, lists: int) -> None:
        self.keys = QueueKeys(prefix)
        self._client = client
        self.scripts = Scripts(client, self.keys)
        self.publisher = Publisher(client, self.keys)
        self._messages = messages
        self.lists = lists

    def fill(self, total: int) -> None:
        """Publish so many messages, to the lists in turn."""
        for number in range(total):
            self.publisher.publish(self._messages.new(number % self.lists))

    def pour(self, total: int) -> None:
        """Publish as `fill` does, many in one round trip."""
        put = self._client.register_script(script("put"))
        for start in range(0, total, POURED):
            with self._client.pipeline(transaction=False) as pipe:
                for number in range(start, min(start + POURED, total)):
                    one = self._messages.new(number % self.lists)
                    facts = (
                        one.list,
                        one.tag,
                        one.organization,
                        one.tokens,
                        one.head_start_s,
                        one.message,
                        one.static_tokens,
                        "",
                    )
                    put(keys=self.keys.of_scripts, args=[self.keys.root, *facts], client=pipe)
                pipe.execute()

    def take(self) -> float:
        """Return how many microseconds one reservation took; the message is replaced by another of its list."""
        began = time.perf_counter()
        taken = reserve_one(self.scripts, HOLDER)
        took_us = (time.perf_counter() - began) * 1e6
        if taken is None:
            raise RuntimeError("there was nothing to reserve")
        tag, record, _ = taken
        self.scripts.run("drop", tag)
        self.publisher.publish(self._messages.new(int(record.split(b'"', 4)[3])))
        return took_us


class Consumed(Ours):
    """A queue of ours, consumed as a worker does: by kombu's consumer, through our transport."""

    def __init__(
        self, url: str, client: redis.Redis, prefix: str, messages: Messages, lists: int, closing: ExitStack
    ) -> None:
        super().__init__(client, prefix, messages, lists)
        configured = configuration()
        options = {**configured["broker_transport_options"], "global_keyprefix": prefix, "holder": HOLDER}
        address = f"{configured['broker_url'].partition('://')[0]}://{url.partition('://')[2]}"
        self._connection = kombu.Connection(address, transport_options=options)
        closing.callback(self._connection.release)
        self._taken: list[Any] = []
        consumer = self._connection.Consumer(configured["task_queues"], on_message=self._taken.append)
        consumer.qos(prefetch_count=0)
        consumer.consume()

    def block(self) -> float:
        """Return the seconds in which a block of messages is published, taken and dropped."""
        began = time.perf_counter()
        self.fill(BLOCK)
        for _ in range(BLOCK):
            while not self._taken:
                self._connection.drain_events(timeout=60)
            message = self._taken.pop()
            self.scripts.run("drop", message.delivery_tag.partition("|")[2])
            message.ack()
        return time.perf_counter() - began
