"""Stock kombu's queues, over its Redis transport as it comes."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import kombu

from bench.queuelab.messages import BLOCK


class Stock:
    """As many queues of stock kombu, all consumed by one consumer, with messages in each."""

    def __init__(self, url: str, prefix: str, body: Any, queues: int, closing: ExitStack) -> None:
        options = {"global_keyprefix": prefix}
        self._connection = kombu.Connection(url, transport_options=options)
        closing.callback(self._connection.release)
        exchange = kombu.Exchange("stock", type="direct")
        self.queues = [kombu.Queue(f"q{number}", exchange, routing_key=f"q{number}") for number in range(queues)]
        self._producer = kombu.Producer(self._connection.channel(), exchange=exchange, auto_declare=False)
        self._body = body
        self._taken: list[Any] = []
        channel = self._connection.channel()
        self.consumer = kombu.Consumer(channel, self.queues, on_message=self._taken.append)
        self.consumer.qos(prefetch_count=0)

    def fill(self, total: int) -> None:
        """Publish so many messages, to the queues in turn."""
        for number in range(total):
            self._producer.publish(self._body, routing_key=f"q{number % len(self.queues)}", serializer="json")

    def consume(self) -> None:
        """Begin to consume."""
        self.consumer.consume()

    def take(self) -> float:
        """Return how many microseconds it took to get one message; it is replaced by another of its queue."""
        began = time.perf_counter()
        while not self._taken:
            self._connection.drain_events(timeout=60)
        took_us = (time.perf_counter() - began) * 1e6
        message = self._taken.pop()
        message.ack()
        self._producer.publish(self._body, routing_key=message.delivery_info["routing_key"], serializer="json")
        return took_us

    def block(self) -> float:
        """Return the seconds in which a block of messages is published, taken and acknowledged."""
        began = time.perf_counter()
        self.fill(BLOCK)
        for _ in range(BLOCK):
            while not self._taken:
                self._connection.drain_events(timeout=60)
            self._taken.pop().ack()
        return time.perf_counter() - began
