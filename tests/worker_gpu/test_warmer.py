"""What a worker computes because it is wished for, on the simulated engine: how much of it, and what when it goes wrong."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
from redis.asyncio import Redis

from tasks.crypto import derive
from tasks.errors import EngineFailed, ModelMismatch
from tasks.job import Sampling
from tasks.metrics import worker as metrics
from tasks.queueing.keys import QueueKeys
from tests.warm_fleet import Fleet
from worker_gpu.admission import Admission
from worker_gpu.background import cancel, through_outages
from worker_gpu.cache import CacheIndex
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.simulated import SimulatedEngine
from worker_gpu.engines.simulated_options import SimulationOptions
from worker_gpu.facts import Facts
from worker_gpu.heart import Heart
from worker_gpu.parts import Parts
from worker_gpu.profiles import StaticPart
from worker_gpu.reporting import Reporter
from worker_gpu.warmer import KEPT_SHARE, Warmer

WORKER = "gpu@test"
PATIENCE_S = 30.0
BLOCK = 16
SALT = b"s" * 32
KEYS = QueueKeys("metaqore:")
#: A profile for each letter, each of another text.
PROFILES = {letter * 64: StaticPart([ord(letter), *range(100, 299)], organization="acme") for letter in "abcdefgh"}
A, B, *_ = PROFILES
TOKENS = len(PROFILES[A].token_ids)


class Shelf:
    """Has the static parts, but for those that it is to fail with."""

    def __init__(self) -> None:
        self.parts = dict(PROFILES)
        self.errors: dict[str, Exception] = {}
        self.asked: list[str] = []

    async def get(self, profile: str) -> StaticPart:
        self.asked.append(profile)
        if profile in self.errors:
            raise self.errors[profile]
        return self.parts[profile]


class Worker:
    """The parts of a worker that warming takes, around an engine with room for so many blocks."""

    def __init__(self, client: Redis, blocks: int, **options: Any) -> None:
        self.engine = SimulatedEngine("tiny", SimulationOptions(num_blocks=blocks, block_size=BLOCK, **options))
        self.cache = CacheIndex(self.engine, 3600)
        self.admission = Admission(WORKER, 16, 8192)
        self.shelf = Shelf()
        heart = cast("Heart", SimpleNamespace(state="ready"))
        self.facts = Facts("tiny", self.engine, self.cache, self.admission, heart)
        self.reporter = Reporter(client, KEYS, WORKER, self.cache, self.facts.report, Counter())
        self.cache.when_changed(self.reporter.changed)
        self.freed = 0
        parts = SimpleNamespace(
            redis=client,
            engine=self.engine,
            admission=self.admission,
            cache=self.cache,
            runner=SimpleNamespace(static_parts=self.shelf, salt=SALT),
        )
        self.warmer = Warmer(cast("Parts", parts), KEYS, self.wish, self.free)

    def wish(self) -> Any:
        """Return what the worker would take."""
        return self.admission.wish(self.engine.load, self.facts.memory)

    def free(self) -> None:
        """Count how often there was more room than before."""
        self.freed += 1

    @property
    def warm(self) -> set[str]:
        """Return the profiles that the cache has wholly."""
        return {name for name in PROFILES if self.cache.cached(name)[0] >= TOKENS}

    async def cached_tokens(self, profile: str, organization: str) -> int:
        """Run a request of an organization; return how much of it was cached."""
        salt = derive(SALT, "cache-salt", organization).hex()
        ids = [*PROFILES[profile].token_ids, 7, 8, 9]
        request = GenerationRequest(f"r-{organization}", ids, Sampling(max_tokens=1, seed=0), salt)
        (delta,) = [delta async for delta in self.engine.generate(request)]
        return delta.cached_tokens


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers ask often."""
    monkeypatch.setattr("worker_gpu.warmer.ASK_EVERY_S", 0.02)


@pytest.fixture
def fleet(redis_url: str) -> Iterator[Fleet]:
    """Return what wishes for something, and looks."""
    with redis.Redis.from_url(redis_url) as client:
        yield Fleet(client)


@asynccontextmanager
async def working(url: str, blocks: int = 1024, **options: Any) -> AsyncGenerator[Worker, None]:
    """Run a worker that reports and warms."""
    client = Redis.from_url(url)
    worker = Worker(client, blocks, **options)
    await worker.engine.start()
    tasks = [
        asyncio.create_task(through_outages(work))
        for work in (worker.reporter.report_for_ever, worker.warmer.warm_for_ever)
    ]
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await client.zscore(KEYS.named("alive"), WORKER):
                await asyncio.sleep(0.01)
        yield worker
    finally:
        await cancel(tasks)
        await worker.engine.stop()
        await client.aclose()


async def until(condition: Callable[[], object]) -> None:
    """Return once `condition` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


def counted(outcome: str) -> float:
    """Return how many profiles have been warmed with this outcome in this process."""
    value: float = metrics.WARMED.labels(outcome)._value.get()
    return value


def test_computed_for_its_own_organization(fleet: Fleet, redis_url: str) -> None:
    """Requests of the organization find it, those of another do not; what was in hand for it is let go."""

    async def run() -> None:
        async with working(redis_url) as worker:
            before = counted("warmed")
            fleet.wish(A, tokens=TOKENS)
            await until(lambda: worker.warm == {A})
            await until(lambda: fleet.wish(A, tokens=TOKENS) == [1, 1, f"held {WORKER}"])
            # Blocks are known when their step begins, which then has to end.
            await until(lambda: counted("warmed") == before + 1)
            assert (worker.admission.in_hand, worker.freed) == (0, 1)
            assert await worker.cached_tokens(A, "acme") == TOKENS // BLOCK * BLOCK
            assert await worker.cached_tokens(A, "other") == 0
            assert worker.shelf.asked == [A]

    asyncio.run(run())


def test_no_more_than_fits(fleet: Fleet, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more wishes than the cache holds some are met, and those stay: they do not evict each other."""
    monkeypatch.setattr("worker_gpu.warmer.REST_S", 0.0)
    blocks = 64

    async def run() -> None:
        async with working(redis_url, blocks) as worker:
            for profile in PROFILES:
                fleet.wish(profile, tokens=TOKENS)
            fitting = int(blocks * BLOCK * KEPT_SHARE / TOKENS)
            await until(lambda: len(worker.warm) == fitting)
            asked, warm = list(worker.shelf.asked), worker.warm
            assert fitting == len(asked) == 3
            await asyncio.sleep(0.3)
            assert (worker.shelf.asked, worker.warm) == (asked, warm)

    asyncio.run(run())


def test_computed_again_after_an_eviction(fleet: Fleet, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as it has rested."""
    monkeypatch.setattr("worker_gpu.warmer.REST_S", 0.5)

    async def run() -> None:
        async with working(redis_url) as worker:
            fleet.wish(A, tokens=TOKENS)
            await until(lambda: worker.warm == {A})
            await until(lambda: fleet.wish(A, copies=0, tokens=TOKENS)[2:] == [f"held {WORKER}"])
            await until(lambda: worker.admission.in_hand == 0)
            assert worker.engine._batch.clear_cache()
            assert worker.warm == set()
            await until(lambda: worker.warm == {A})
            assert worker.shelf.asked == [A, A]

    asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [ModelMismatch(), EngineFailed("it fails"), RuntimeError("a word of the prompt")],
    ids=lambda e: type(e).__name__,
)
def test_what_fails_is_left_to_others(
    fleet: Fleet, redis_url: str, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes its mark back, rests from that profile, and computes the others."""

    async def run() -> None:
        async with working(redis_url) as worker:
            before = counted("failed")
            worker.shelf.errors[A] = error
            fleet.wish(A, tokens=TOKENS, seconds=60)
            await until(lambda: counted("failed") == before + 1)
            await until(lambda: fleet.wish(A, copies=0, tokens=TOKENS) == [0, 1])
            fleet.wish(B, tokens=TOKENS)
            await until(lambda: worker.warm == {B})
            assert worker.shelf.asked == [A, B]
            fleet.report("other")
            assert fleet.ask("other") == A

    asyncio.run(run())
    assert "a word" not in capsys.readouterr().out


def test_what_the_cache_does_not_keep(fleet: Fleet, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile without a full block is not computed again and again."""
    monkeypatch.setattr("worker_gpu.warmer.KNOWN_S", 0.05)

    async def run() -> None:
        async with working(redis_url) as worker:
            before = counted("not_kept")
            worker.shelf.parts[A] = StaticPart(range(BLOCK - 1), organization="acme")
            fleet.wish(A, tokens=BLOCK - 1)
            await until(lambda: counted("not_kept") == before + 1)
            await asyncio.sleep(0.3)
            assert worker.shelf.asked == [A]

    asyncio.run(run())


def test_an_end_in_the_middle(fleet: Fleet, redis_url: str) -> None:
    """A worker that is stopped while it computes aborts that, and another computes it once this one is gone."""

    async def run() -> None:
        # A step takes so long that the prompt is not computed before the end.
        async with working(redis_url, time_scale=100_000) as worker:
            fleet.report("other")
            fleet.wish(A, tokens=TOKENS)
            await until(lambda: worker.admission.in_hand == 1)
            assert worker.wish().in_flight == TOKENS
            assert fleet.ask("other") is None
        assert (worker.admission.in_hand, worker.engine.load.running, worker.engine.load.waiting) == (0, 0, 0)
        await worker_gone()
        assert fleet.ask("other") == A

    async def worker_gone() -> None:
        client = Redis.from_url(redis_url)
        await Reporter(client, KEYS, WORKER, cast("Any", None), dict, Counter()).stop()
        await client.aclose()

    asyncio.run(run())
