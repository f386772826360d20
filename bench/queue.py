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

import statistics
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack

import redis

from bench.queuelab.messages import BLOCK, Messages
from bench.queuelab.ours import Consumed, Ours
from bench.queuelab.stock import Stock
from bench.report import arguments, finish
from tasks.queueing.connecting import connect
from tests.services import RedisServer

FEW, MANY, STOCK_MANY = 10, 10_000, 1_000
THOUSAND, MILLION = 1_000, 1_000_000
TIMED, STOCK_TIMED = 2_000, 100
BLOCKS = 15


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
    ours = Consumed(url, client, "ours:", messages, FEW, closing)
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
