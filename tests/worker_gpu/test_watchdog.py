"""A dead or hung engine is found within ten seconds; one that is slow or idle is left alone. Time is virtual here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tasks.errors import EngineDead
from tests.worker_gpu.engines.engine_runs import collect, request, with_engine
from worker_gpu.engines.base import STALL_S
from worker_gpu.engines.simulated import SimulatedEngine
from worker_gpu.watchdog import Watchdog

FOUND_WITHIN_S = 10.0


@pytest.mark.parametrize("what", ["die", "out_of_memory", "hang"])
def test_an_engine_that_breaks_is_found(what: str) -> None:
    """While it runs requests: others go on until then."""

    async def check(engine: SimulatedEngine) -> None:
        clock = asyncio.get_running_loop().time
        watching = asyncio.create_task(Watchdog(engine, STALL_S).watch())
        await collect(engine, request())
        running = [asyncio.ensure_future(collect(engine, request(seed=seed))) for seed in (2, 3)]
        await asyncio.sleep(0.5)
        broke_at = clock()
        with pytest.raises(EngineDead):
            await watching
        print(f"found after {clock() - broke_at:.1f} s")
        assert clock() - broke_at < FOUND_WITHIN_S
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    with_engine(check, faults=[{"what": what, "request": 3}], time_scale=1.0)


def test_an_engine_that_is_idle_is_well() -> None:
    """Without requests there are no steps, for hours."""

    async def check(engine: SimulatedEngine) -> None:
        watching = asyncio.create_task(Watchdog(engine, STALL_S).watch())
        await asyncio.sleep(2 * 3600)
        assert not watching.done()
        assert await collect(engine, request())
        watching.cancel()

    with_engine(check)


def test_an_engine_that_is_slow_is_well() -> None:
    """A token every seven seconds is a step every seven seconds."""

    async def check(engine: SimulatedEngine) -> None:
        watching = asyncio.create_task(Watchdog(engine, STALL_S).watch())
        assert len(await collect(engine, request(max_tokens=30))) == 30
        assert not watching.done()
        watching.cancel()

    with_engine(check, tokens_per_s_per_sequence=1 / 7, time_scale=1.0)


class Stuck:
    """An engine with requests that takes no step until it is told to."""

    stall_s, busy, steps = STALL_S, True, 1

    async def check_health(self) -> None:
        """Be well."""


def test_a_process_that_was_stopped_does_not_blame_the_engine() -> None:
    """After a pause of a minute the engine's reports have to be read first; two rounds of it count at most."""

    async def check(_engine: SimulatedEngine) -> None:
        loop: Any = asyncio.get_running_loop()
        engine: Any = Stuck()
        watching = asyncio.create_task(Watchdog(engine, STALL_S).watch())
        await asyncio.sleep(3)
        loop._pass(60)
        await asyncio.sleep(1.5)
        assert not watching.done()
        engine.steps += 1
        await asyncio.sleep(STALL_S - 1)
        assert not watching.done()
        with pytest.raises(EngineDead):
            await asyncio.wait_for(watching, 3)

    with_engine(check)
