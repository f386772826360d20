"""The queue beside kombu's stock Redis transport, on one Redis, in one run.

    cost         what taking one message costs with 10 and with 10,000 lists that are not empty. Stock kombu names all its
                 queues in each blocking read, so it is asked with 10 and 1,000; with 10,000 a message takes a second.
    throughput   messages published, taken and finished, by one process and one connection each: ours with Publisher, kombu's
                 consumer and drop; stock with a producer, the same consumer and an acknowledgement
    --million    one million queued: what a reservation costs then, beside one of a thousand, and what a request takes of
                 Redis' memory

The compared things take turns, one message or one block of messages at a time, and the median of each is told. So what
else the machine does slows all of them alike. The messages are those of requests with 200 dynamic tokens.
"""

from __future__ import annotations

import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import Any

import kombu
import redis

from bench.report import arguments, finish
from tasks.app import configuration
from tasks.crypto import KEY_BYTES, KeyWrapper, Signer
from tasks.ids import new_request_id
from tasks.job import Job, Prompt, Sampling
from tasks.queueing.connecting import connect
from tasks.queueing.keys import QueueKeys, script
from tasks.queueing.message import MessageCodec, Queued
from tasks.queueing.publisher import Publisher
from tasks.queueing.scripts import Scripts
from tests.reserving import reserve_one
from tests.services import RedisServer

FEW, MANY, STOCK_MANY = 10, 10_000, 1_000
THOUSAND, MILLION = 1_000, 1_000_000
TIMED, STOCK_TIMED = 2_000, 100
BLOCK, BLOCKS = 200, 15
POURED = 1_000
HOLDER = "bench"
TOKENS = 6_000


class Messages:
    """Messages as a gateway makes them: one is sealed for real, and the others are it under other names."""

    def __init__(self, seed: int) -> None:
        wrapper = KeyWrapper((b"m" * KEY_BYTES,))
        data_key, wrapped = wrapper.new_key("bench")
        chance = random.Random(seed)
        prompt = Prompt("0" * 64, tuple(chance.randrange(49_000) for _ in range(200)), TOKENS)
        job = Job(new_request_id(), 1, "acme", prompt, Sampling(seed=7), time.time(), data_key)
        self.sample = MessageCodec(Signer((b"s" * KEY_BYTES,)), wrapper).encode(job, wrapped)
        self._numbers = count()

    def new(self, list_number: int) -> Queued:
        """Return a message for the list of that number."""
        sample, tag = self.sample, f"{next(self._numbers):035}:1"
        message = sample.message.replace(sample.tag, tag)
        return Queued(tag, f"{list_number:064}", sample.organization, sample.tokens, 0, message)


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


class Consumed(Ours):
    """A queue of ours, consumed as a worker does: by kombu's consumer, through our transport."""

    def __init__(self, url: str, client: redis.Redis, prefix: str, messages: Messages, closing: ExitStack) -> None:
        super().__init__(client, prefix, messages, FEW)
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


def in_turn(times: int, *ways: Callable[[], float]) -> list[float]:
    """Return the median of each of the ways, which take turns."""
    seen: list[list[float]] = [[] for _ in ways]
    for _ in range(times):
        for way, figures in zip(ways, seen, strict=True):
            figures.append(way())
    return [statistics.median(figures) for figures in seen]


def cost(client: redis.Redis, url: str, messages: Messages, closing: ExitStack) -> dict[str, float]:
    """Compare few and many lists, ours and stock kombu's."""
    few, many = (Ours(client, f"{name}:", messages, lists) for name, lists in (("few", FEW), ("many", MANY)))
    for side in (few, many):
        side.pour(2 * MANY)
    few_us, many_us = in_turn(TIMED, few.take, many.take)
    body = [[messages.sample.message], {}, {}]
    stocks = [Stock(url, f"stock{queues}:", body, queues, closing) for queues in (FEW, STOCK_MANY)]
    for stock in stocks:
        for queue in stock.queues:
            queue(stock.consumer.channel).declare()
        stock.fill(2 * STOCK_MANY)
        stock.consume()
    stock_few_us, stock_many_us = in_turn(STOCK_TIMED, *(stock.take for stock in stocks))
    return {
        "reserve_10_lists_us": few_us,
        "reserve_10000_lists_us": many_us,
        "reserve_ratio": many_us / few_us,
        "stock_10_queues_us": stock_few_us,
        "stock_1000_queues_us": stock_many_us,
        "stock_ratio": stock_many_us / stock_few_us,
    }


def throughput(client: redis.Redis, url: str, messages: Messages, closing: ExitStack) -> dict[str, float]:
    """Compare ours and stock kombu's, a block of messages each in turn."""
    ours = Consumed(url, client, "ours:", messages, closing)
    stock = Stock(url, "stock:", [[messages.sample.message], {}, {}], 1, closing)
    for queue in stock.queues:
        queue(stock.consumer.channel).declare()
    stock.consume()
    in_turn(1, ours.block, stock.block)
    ours_s, stock_s = in_turn(BLOCKS, ours.block, stock.block)
    return {
        "throughput_per_s": BLOCK / ours_s,
        "stock_throughput_per_s": BLOCK / stock_s,
        "throughput_ratio": stock_s / ours_s,
    }


def million(client: redis.Redis, messages: Messages) -> dict[str, float]:
    """Compare a thousand and a million queued, in as many lists."""
    short, long = (Ours(client, f"{name}:", messages, THOUSAND) for name in ("short", "long"))
    short.fill(THOUSAND)
    before = client.info("memory")["used_memory"]
    long.pour(MILLION)
    per_request = (client.info("memory")["used_memory"] - before) / MILLION
    short_us, long_us = in_turn(TIMED, short.take, long.take)
    return {
        "reserve_1000_queued_us": short_us,
        "reserve_million_queued_us": long_us,
        "million_ratio": long_us / short_us,
        "memory_per_request_bytes": per_request,
        "message_bytes": float(len(messages.sample.message)),
    }


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--million", action="store_true", help="fill a queue with a million messages, about 3 GB")
    options: Namespace = parser.parse_args()
    server = RedisServer()
    with ExitStack() as closing:
        closing.callback(server.close)
        server.start()
        client = connect(server.url, 60)
        closing.callback(client.close)
        # What is compared is the queue, not the disk.
        client.config_set("appendonly", "no")
        messages = Messages(options.seed)
        figures = cost(client, server.url, messages, closing)
        client.flushall()
        figures |= throughput(client, server.url, messages, closing)
        targets = {"reserve_ratio": ("<=", 1.2), "throughput_ratio": (">=", 1.0)}
        if options.million:
            client.flushall()
            figures |= million(client, messages)
            targets["million_ratio"] = ("<=", 1.2)
    finish("queue", options, figures, targets)


if __name__ == "__main__":
    main()
