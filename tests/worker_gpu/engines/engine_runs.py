"""Runs requests on a simulated engine whose loop only pretends to sleep."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from tasks.job import Sampling
from tests.worker_gpu.engines.virtual_time import PROMPT, run_virtually
from worker_gpu.engines.base import Delta, GenerationRequest
from worker_gpu.engines.simulated import SimulatedEngine
from worker_gpu.engines.simulated_options import SimulationOptions

_numbers = count()


@asynccontextmanager
async def running(**arguments: Any) -> AsyncIterator[SimulatedEngine]:
    """Run an engine that takes no time, unless told otherwise."""
    engine = SimulatedEngine("stand-in", SimulationOptions(**{"time_scale": 0.0, **arguments}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request(prompt: list[int] = PROMPT, *, salt: str = "salt", **sampling: Any) -> GenerationRequest:
    """Return a request with an id of its own."""
    asked = Sampling(**{"seed": 1, "max_tokens": 400, **sampling})
    return GenerationRequest(f"request-{next(_numbers)}", prompt, asked, salt)


async def collect(engine: SimulatedEngine, job: GenerationRequest) -> list[Delta]:
    """Run one request to its end."""
    return [delta async for delta in engine.generate(job)]


def with_engine(
    check: Callable[[SimulatedEngine], Awaitable[None]], overshoot_s: float = 0.0, **arguments: Any
) -> None:
    """Run `check` on a running engine, on a loop that only pretends to sleep."""

    async def run() -> None:
        async with running(**arguments) as engine:
            await check(engine)

    run_virtually(run(), overshoot_s)
