"""What the queue knows of a worker's cache follows what the worker knows of it, whatever becomes of Redis meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import redis
from redis.asyncio import Redis as AsyncRedis

from tasks.queueing.keys import QueueKeys
from tasks.queueing.pull import Held
from tests.services import RedisServer
from worker_gpu import reporting
from worker_gpu.background import cancel, through_outages
from worker_gpu.reporting import Reporter

A, B, C = (letter * 64 for letter in "abc")
INNER = "d" * 32
ALL, NOTHING = (64, 64, 64), (0, 0, 0)
PATIENCE_S = 20.0
KEYS = QueueKeys("x:")


@dataclass
class PlayedIndex:
    """Holds what a test says, and counts how often it was asked."""

    held: dict[str, Held] = field(default_factory=dict)
    changed: dict[str, Held] = field(default_factory=dict)
    asked: int = 0

    def set(self, **links: Held) -> None:
        """Hold so much of these links from now on."""
        for link, held in links.items():
            self.changed[link] = self.held[link] = held
            if held == NOTHING:
                del self.held[link]

    def changes(self) -> Mapping[str, Held]:
        self.asked += 1
        told, self.changed = self.changed, {}
        return told

    def everything(self) -> Mapping[str, Held]:
        self.asked += 1
        self.changed = {}
        return dict(self.held)


@dataclass
class Reported:
    """A reporter at work, and what the queue knows by it."""

    server: RedisServer
    index: PlayedIndex
    reporter: Reporter
    served: Counter[str]
    looking: redis.Redis

    def hold(self, **links: Held) -> None:
        """Have the index hold so much of these links, and the reporter hear that something changed."""
        self.index.set(**links)
        self.reporter.changed()

    @property
    def known(self) -> dict[str, Held]:
        """Return what the queue believes that the worker holds."""
        cache = cast("dict[bytes, bytes]", self.looking.hgetall(KEYS.named("cache:gpu@test")))
        return {link.decode(): cast("Held", tuple(map(int, held.split()))) for link, held in cache.items()}

    @property
    def last(self) -> dict[str, Any]:
        """Return what the queue has of the last report."""
        text = cast("bytes | None", self.looking.hget(KEYS.named("facts"), "gpu@test"))
        return json.loads(text) if text else {}

    async def until(self, condition: Callable[[], object]) -> None:
        """Return once `condition` holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not await asyncio.to_thread(condition):
                await asyncio.sleep(0.005)


def with_reporter(server: RedisServer, work: Callable[[Reported], Coroutine[Any, Any, None]]) -> None:
    """Have a test work with a reporter, on a loop of its own."""

    async def run() -> None:
        index, served = PlayedIndex(), Counter[str]()
        async with AsyncRedis.from_url(server.url) as client:
            reporter = Reporter(client, KEYS, "gpu@test", index, lambda: {"state": "ready"}, served)
            task = asyncio.create_task(through_outages(reporter.report_for_ever))
            with redis.Redis.from_url(server.url) as looking:
                try:
                    await work(Reported(server, index, reporter, served, looking))
                finally:
                    await cancel([task])

    asyncio.run(run())


def test_what_changes_is_told(redis_server: RedisServer, redis_url: str) -> None:
    """At once: what came, what became less, and what went; and everything is forgotten when the worker ends."""

    async def work(mine: Reported) -> None:
        await mine.until(lambda: mine.last)
        assert mine.last["facts"] == {"epoch": mine.last["epoch"], "state": "ready"}
        mine.hold(**{A: ALL, B: (32, 64, 64), INNER: (16, 16, 16)})
        await mine.until(lambda: len(mine.known) == 3)
        assert mine.known == mine.index.held
        mine.hold(**{A: NOTHING, B: ALL, C: ALL})
        await mine.until(lambda: C in mine.known)
        assert mine.known == mine.index.held == {B: ALL, C: ALL, INNER: (16, 16, 16)}
        copies = mine.looking.hgetall(KEYS.named(f"copies:{C}"))
        assert copies == {b"gpu@test": b"held 64"}
        await mine.reporter.stop()
        assert (mine.known, mine.last) == ({}, {})
        assert not mine.looking.keys("x:gpu:copies:*")

    with_reporter(redis_server, work)


def test_what_comes_together_is_told_together(
    redis_server: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred changes within the time to wait are one report; without any there is one now and then."""
    monkeypatch.setattr(reporting, "JOIN_S", 0.5)
    monkeypatch.setattr(reporting, "INTERVAL_S", 30.0)

    async def work(mine: Reported) -> None:
        await mine.until(lambda: mine.last)
        for number in range(100):
            mine.hold(**{A: (number + 1, 200, 200)})
            await asyncio.sleep(0)
        await mine.until(lambda: mine.known)
        assert mine.known == {A: (100, 200, 200)}
        assert mine.last["number"] == mine.index.asked == 2

    with_reporter(redis_server, work)


def test_without_news_it_says_that_it_lives(
    redis_server: RedisServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be taken for dead, and what it holds for nobody's."""
    monkeypatch.setattr(reporting, "INTERVAL_S", 0.1)

    async def work(mine: Reported) -> None:
        await mine.until(lambda: mine.last.get("number", 0) > 3)
        assert mine.known == {}

    with_reporter(redis_server, work)


def test_a_redis_that_was_emptied_is_told_everything(redis_server: RedisServer, redis_url: str) -> None:
    """With the next report, which is about something else; the scripts are gone there too."""

    async def work(mine: Reported) -> None:
        mine.hold(**{A: ALL, INNER: ALL})
        await mine.until(lambda: len(mine.known) == 2)
        mine.looking.flushall()
        mine.looking.script_flush()
        mine.hold(**{B: ALL})
        await mine.until(lambda: mine.known == {A: ALL, B: ALL, INNER: ALL})

    with_reporter(redis_server, work)


def test_an_outage_of_redis(own_redis: RedisServer) -> None:
    """Be it that it hangs, or is gone: the loop goes on; what changed is told afterwards, and nothing served is forgotten."""

    async def work(mine: Reported) -> None:
        mine.hold(**{A: ALL})
        await mine.until(lambda: mine.known)
        mine.looking.zadd(KEYS.named("served"), {"acme": 0})
        mine.served["acme"] += 5
        assert own_redis.pid is not None
        os.kill(own_redis.pid, signal.SIGSTOP)
        mine.hold(**{A: NOTHING, B: ALL})
        mine.served["acme"] += 7
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(50):
                await asyncio.sleep(0.005)
        own_redis.kill()
        await asyncio.to_thread(own_redis.start)
        await mine.until(lambda: mine.known == {B: ALL})
        assert not mine.looking.exists(KEYS.named(f"copies:{A}"))
        await mine.until(lambda: mine.looking.zscore(KEYS.named("served"), "acme") == 12)
        assert not mine.served

    with_reporter(own_redis, work)


def test_another_process_under_the_same_name(redis_server: RedisServer, redis_url: str) -> None:
    """As after a restart: what the one before held is forgotten, and the newer one's reports count from its first."""

    async def work(mine: Reported) -> None:
        mine.hold(**{A: ALL})
        await mine.until(lambda: mine.known)
        first = mine.last["epoch"]

        async def again(newer: Reported) -> None:
            newer.hold(**{B: ALL})
            await newer.until(lambda: newer.known == {B: ALL} and newer.last["epoch"] != first)

        await asyncio.to_thread(with_reporter, redis_server, again)

    with_reporter(redis_server, work)


def test_an_end_while_redis_is_away(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's end does not wait for it."""
    monkeypatch.setattr(reporting, "_STOP_S", 0.2)

    async def work(mine: Reported) -> None:
        await mine.until(lambda: mine.last)
        own_redis.kill()
        async with asyncio.timeout(PATIENCE_S):
            await mine.reporter.stop()

    with_reporter(own_redis, work)
