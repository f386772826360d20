"""Faults that the simulation makes on purpose strike whom they are meant for, in the middle of the others' answers."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.errors import EngineDead, EngineFailed
from tests.worker_gpu.engines.engine_runs import collect, request, with_engine
from worker_gpu.engines.simulated import SimulatedEngine
from worker_gpu.engines.simulated_options import SimulationOptions

#: Slow enough for the others to be in the middle of their answers.
PACE = {"tokens_per_s_per_sequence": 50, "time_scale": 1.0}


async def outcomes(engine: SimulatedEngine, *seeds: int) -> list[Any]:
    """Run requests beside one another; return the number of deltas, or the error, of each."""

    async def run(seed: int) -> int:
        return len(await collect(engine, request(seed=seed, max_tokens=20)))

    return await asyncio.gather(*(run(seed) for seed in seeds), return_exceptions=True)


@pytest.mark.parametrize("meant", [{"request": 2}, {"seed": 7}])
def test_one_request_fails(meant: dict[str, int]) -> None:
    """Nobody else notices. A number strikes once, a seed each time."""

    async def check(engine: SimulatedEngine) -> None:
        first, second, third = await outcomes(engine, 1, 7, 3)
        assert (first, third) == (20, 20)
        assert type(second) is EngineFailed
        assert second.retryable
        (again,) = await outcomes(engine, 7)
        assert (type(again) is EngineFailed) == ("seed" in meant)
        await engine.check_health()

    with_engine(check, faults=[{"what": "fail", **meant}], **PACE)


@pytest.mark.parametrize("what", ["die", "out_of_memory"])
def test_the_engine_dies(what: str) -> None:
    """With all that it runs, and for good."""

    async def check(engine: SimulatedEngine) -> None:
        assert [type(one) for one in await outcomes(engine, 1, 2, 3)] == [EngineDead] * 3
        with pytest.raises(EngineDead):
            await engine.check_health()
        assert [type(one) for one in await outcomes(engine, 4)] == [EngineDead]

    with_engine(check, faults=[{"what": what, "request": 3}], **PACE)


def test_the_engine_hangs() -> None:
    """It seems to be well, and takes no step."""

    async def check(engine: SimulatedEngine) -> None:
        running = asyncio.create_task(outcomes(engine, 1, 2))
        await asyncio.sleep(1)
        steps = engine.steps
        assert steps
        await asyncio.sleep(1000)
        await engine.check_health()
        assert (engine.steps, engine.busy, running.done()) == (steps, True, False)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert not engine.busy

    with_engine(check, faults=[{"what": "hang", "request": 2}], **PACE)


def test_the_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word."""
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *how: killed.append(how))

    async def check(engine: SimulatedEngine) -> None:
        await outcomes(engine, 5, 666)
        assert killed == [(os.getpid(), signal.SIGKILL)]

    with_engine(check, faults=[{"what": "kill", "seed": 666}], **PACE)


def test_a_request_that_has_left_meets_no_fault() -> None:
    """Whoever goes away before the first token takes the fault along."""

    async def check(engine: SimulatedEngine) -> None:
        leaving = engine.generate(request())
        waiting = asyncio.ensure_future(anext(leaving))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await outcomes(engine, 2) == [20]

    with_engine(check, faults=[{"what": "die", "request": 1}], **PACE)


def test_steps_are_counted() -> None:
    """Each token of one request is one step; without requests there is none."""

    async def check(engine: SimulatedEngine) -> None:
        await asyncio.sleep(10)
        assert (engine.steps, engine.busy) == (0, False)
        await collect(engine, request(max_tokens=5))
        assert engine.steps >= 5

    with_engine(check)


def test_slow_engines_are_given_longer() -> None:
    """Where one step takes longer than an engine usually may be silent."""
    for options, patient in (({}, False), ({"time_scale": 1000}, True), ({"tokens_per_s_per_sequence": 0.01}, True)):
        engine = SimulatedEngine("stand-in", SimulationOptions(**options))
        assert (engine.stall_s > 8) == patient


@pytest.mark.parametrize(
    "fault",
    [
        {"what": "fail"},
        {"what": "fail", "request": 1, "seed": 1},
        {"what": "sulk", "seed": 1},
        {"what": "die", "request": 0},
    ],
)
def test_faults_that_make_no_sense_are_refused(fault: dict[str, Any]) -> None:
    """Each must say what, and at which request."""
    with pytest.raises(ValidationError):
        SimulationOptions.model_validate({"faults": [fault]})
