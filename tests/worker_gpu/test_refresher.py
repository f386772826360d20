"""A worker's profiles stay in its KV cache while others' tasks and answers pass through it; on the simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import pytest

from tasks.errors import EngineFailed
from tasks.job import Sampling
from worker_gpu.admission import Admission
from worker_gpu.background import cancel
from worker_gpu.cache import CacheIndex
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.simulated import SimulatedEngine
from worker_gpu.engines.simulated_options import SimulationOptions
from worker_gpu.freshness import STORED_SHARE, Freshness
from worker_gpu.parts import Parts
from worker_gpu.refresher import Refresher

PROFILE, IDS, SALT = "a" * 64, list(range(100, 260)), "salt"
PATIENCE_S = 30.0


class Worker:
    """The parts of a worker that this takes, around an engine with room for 40 blocks; the profile has ten."""

    def __init__(self) -> None:
        options = SimulationOptions(num_blocks=40, answer_tokens=32, time_scale=0)
        self.engine = SimulatedEngine("tiny", options)
        self.cache = CacheIndex(self.engine, 3600)
        self.admission = Admission("gpu@test", 16, 8192)
        self.freshness = Freshness()
        self.engine.subscribe(self.freshness.hear)
        self.freed = self.others = 0
        parts = SimpleNamespace(
            engine=self.engine,
            admission=self.admission,
            cache=self.cache,
            runner=SimpleNamespace(freshness=self.freshness),
        )
        self.refresher = Refresher(cast("Parts", parts), self.free)

    def free(self) -> None:
        """Count how often there was more room than before."""
        self.freed += 1

    async def ask(self, name: str, ids: list[int]) -> int:
        """Run a request; return how many of its tokens were cached."""
        request = GenerationRequest(name, ids, Sampling(max_tokens=40, seed=1), SALT)
        deltas = [delta async for delta in self.engine.generate(request)]
        return deltas[0].cached_tokens

    async def use_profile(self) -> int:
        """Run a request with the profile; return how many of its tokens were cached."""
        self.cache.register(PROFILE, (), len(IDS), IDS, SALT)
        self.freshness.use(PROFILE, IDS, SALT, asyncio.get_running_loop().time())
        return await self.ask("with the profile", [*IDS, 1])

    async def pass_through(self, *, wait: bool) -> None:
        """Run requests of four blocks each with answers of two, more than the cache holds; `wait` for the profile's use."""
        for _ in range(20):
            self.others += 1
            await self.ask(f"other {self.others}", list(range(10_000 * self.others, 10_000 * self.others + 64)))
            while wait and self.is_due():
                await asyncio.sleep(0.005)

    def is_due(self) -> bool:
        """Tell whether the profile should be used again, and that was not begun."""
        stored_since = self.freshness._stored - self.freshness._uses[PROFILE].stored
        return stored_since > STORED_SHARE * self.cache.facts.free_tokens


@asynccontextmanager
async def working(*, refreshes: bool) -> AsyncGenerator[Worker, None]:
    """Run a worker."""
    worker = Worker()
    await worker.engine.start()
    tasks = [asyncio.create_task(worker.refresher.refresh_for_ever())] if refreshes else []
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield worker
    finally:
        await cancel(tasks)
        await worker.engine.stop()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers look often."""
    monkeypatch.setattr("worker_gpu.refresher.LOOK_EVERY_S", 0.005)


async def _outlives(refreshes: bool) -> tuple[int, int]:
    async with working(refreshes=refreshes) as worker:
        assert await worker.use_profile() == 0
        await worker.pass_through(wait=refreshes)
        assert worker.admission.in_hand == 0
        return await worker.use_profile(), worker.freed


def test_a_profile_outlives_what_passes_through_only_if_it_is_used_again() -> None:
    """Without that it is evicted, as the same run shows."""
    cached, freed = asyncio.run(_outlives(refreshes=True))
    assert cached == len(IDS)
    assert freed >= 10
    assert asyncio.run(_outlives(refreshes=False)) == (0, 0)


def test_an_engine_that_fails_at_it_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again when it is due again, and nothing stays in hand."""

    async def failing() -> None:
        async with working(refreshes=True) as worker:
            generate = worker.engine.generate

            async def fail(request: GenerationRequest) -> AsyncGenerator[object, None]:
                if request.request_id.startswith("fresh-"):
                    raise EngineFailed("by lot")
                async for delta in generate(request):
                    yield delta

            monkeypatch.setattr(worker.engine, "generate", fail)
            while worker.freed < 2:
                await worker.use_profile()
                await worker.pass_through(wait=False)
            assert worker.admission.in_hand == 0
            monkeypatch.setattr(worker.engine, "generate", generate)
            await worker.use_profile()
            await worker.pass_through(wait=True)

    asyncio.run(failing())
