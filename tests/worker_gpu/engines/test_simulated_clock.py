"""The simulated engine on a clock: tokens come when their steps end, whatever the loop does meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from tests.worker_gpu.engines.engine_runs import collect, request, with_engine
from tests.worker_gpu.engines.virtual_time import VirtualLoop
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.simulated import MAX_LAG_S, SimulatedEngine
from worker_gpu.engines.simulated_options import PREFILL_TOKENS_PER_S, STEP_S, STEP_S_PER_SEQUENCE


async def span(engine: SimulatedEngine, job: GenerationRequest) -> float:
    """Run a request; return the seconds from its first token to its last."""
    clock = asyncio.get_running_loop().time
    at = [clock() async for _ in engine.generate(job)]
    return at[-1] - at[0]


def test_tokens_come_when_their_steps_end() -> None:
    """20 tokens are 20 steps, for one request as for 32."""

    async def check(engine: SimulatedEngine) -> None:
        spans = await asyncio.gather(*(span(engine, request(seed=seed, max_tokens=20)) for seed in range(32)))
        assert spans == [pytest.approx(19 * (STEP_S + 32 * STEP_S_PER_SEQUENCE))] * 32

    with_engine(check, time_scale=1.0)


def test_late_sleeps_do_not_add_up() -> None:
    """On a clock whose every sleep lasts 2 ms too long, 101 tokens still take 100 steps and at most one lateness."""

    async def check(engine: SimulatedEngine) -> None:
        took = await span(engine, request(max_tokens=101))
        assert took == pytest.approx(100 * (STEP_S + STEP_S_PER_SEQUENCE), abs=0.0021)

    with_engine(check, overshoot_s=0.002, time_scale=1.0, answer_tokens=200)


def test_a_busy_loop_makes_it_late_and_not_hurried() -> None:
    """After ten seconds away, tokens come as they would have; there is no burst of 2,000."""

    async def check(engine: SimulatedEngine) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        reader = engine.generate(request(max_tokens=100))
        await anext(reader)
        loop.now += 10
        rest = [loop.time() async for _ in reader]
        assert rest[-1] - rest[0] > 98 * STEP_S - MAX_LAG_S

    with_engine(check, time_scale=1.0, answer_tokens=200)


def test_time_can_be_stretched() -> None:
    """And prefill is reported as it was seen: 5,000 tokens at 25,000 a second are 0.2 s, ten times as slow 2 s."""

    async def check(engine: SimulatedEngine) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        (cold,) = await collect(engine, request(list(range(5000)), max_tokens=1))
        assert (
            clock() - began == pytest.approx(cold.prefill_s) == pytest.approx(2 + 10 * (STEP_S + STEP_S_PER_SEQUENCE))
        )
        (warm,) = await collect(engine, request(list(range(5000)), max_tokens=1))
        assert warm.cached_tokens == 4992
        assert warm.prefill_s == pytest.approx(10 * (STEP_S + STEP_S_PER_SEQUENCE + 8 / PREFILL_TOKENS_PER_S))

    with_engine(check, time_scale=10.0)


def test_paced_streams_flow_side_by_side() -> None:
    """Ten streams of 21 tokens at 20 a second take 1 s from first to last token, as one would."""

    async def check(engine: SimulatedEngine) -> None:
        spans = await asyncio.gather(*(span(engine, request(seed=seed)) for seed in range(10)))
        assert spans == [pytest.approx(1.0)] * 10

    with_engine(check, time_scale=1.0, tokens_per_s_per_sequence=20, answer_tokens=21)
