"""The simulated engine keeps the promises that load tests rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tasks.errors import ConfigurationError, EngineDead, PromptTooLong
from tasks.job import Sampling
from tasks.settings import EngineGroup, Settings
from worker_gpu.engines import create_engine
from worker_gpu.engines.base import Delta, GenerationRequest
from worker_gpu.engines.simulated import STEP_S, PrefixCache, SimulatedEngine, block_hashes

PROMPT = list(range(100, 200))


@asynccontextmanager
async def running(**arguments: Any) -> AsyncIterator[SimulatedEngine]:
    """Run an engine that takes no time, unless told otherwise."""
    engine = SimulatedEngine("stand-in", **{"time_scale": 0.0, **arguments})
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request(
    prompt: list[int] = PROMPT, *, salt: str = "salt", seed: int = 1, max_tokens: int = 400
) -> GenerationRequest:
    """Return a request; its id does not matter to this engine."""
    return GenerationRequest("id", prompt, Sampling(max_tokens=max_tokens, seed=seed), salt)


async def collect(engine: SimulatedEngine, job: GenerationRequest) -> list[Delta]:
    """Run one request to its end."""
    return [delta async for delta in engine.generate(job)]


def with_engine(check: Callable[[SimulatedEngine], Awaitable[None]], **arguments: Any) -> None:
    """Run `check` on a running engine."""

    async def run() -> None:
        async with running(**arguments) as engine:
            await asyncio.wait_for(check(engine), 20)

    asyncio.run(run())


def test_text_depends_on_prompt_and_seed_only() -> None:
    """A retry gives the same text, in company or alone, for another salt and on another engine."""

    async def check(engine: SimulatedEngine) -> None:
        jobs = [request(), request(salt="other"), request(seed=2), request([*PROMPT, 7])]
        together = await asyncio.gather(*(collect(engine, job) for job in jobs))
        texts = ["".join(delta.text for delta in deltas) for deltas in together]
        assert texts[0] == texts[1]
        assert len(set(texts)) == 3
        async with running(max_num_seqs=1) as other:
            assert "".join(delta.text for delta in await collect(other, request())) == texts[0]

    with_engine(check)


def test_answers_end_by_themselves_or_at_the_limit() -> None:
    """The last delta, and no other, tells why; counts grow by one."""

    async def check(engine: SimulatedEngine) -> None:
        free, cut = (await collect(engine, request()), await collect(engine, request(max_tokens=5)))
        assert [delta.finish_reason for delta in free if delta.finish_reason] == ["stop"]
        assert free[-1].finish_reason == "stop"
        assert [delta.output_tokens for delta in cut] == [1, 2, 3, 4, 5]
        assert cut[-1].finish_reason == "length"
        assert [delta.text for delta in cut] == [delta.text for delta in free[:5]]

    with_engine(check)


def test_context_window_bounds_the_answer() -> None:
    """A prompt that leaves room for 3 tokens gets 3; one that leaves none is refused."""

    async def check(engine: SimulatedEngine) -> None:
        assert len(await collect(engine, request(PROMPT[:97]))) == 3
        with pytest.raises(PromptTooLong):
            await collect(engine, request())

    with_engine(check, max_model_len=100)


def test_prefix_cache_finds_whole_blocks_of_the_same_salt() -> None:
    """100 tokens are six full blocks of 16; a prompt of whole blocks still has its last one computed."""

    async def check(engine: SimulatedEngine) -> None:
        async def cached(job: GenerationRequest) -> int:
            return (await collect(engine, job))[0].cached_tokens

        assert await cached(request()) == 0
        assert await cached(request()) == 96
        assert await cached(request([*PROMPT[:50], 1, 2, 3])) == 48
        assert await cached(request(PROMPT[:96])) == 80
        assert await cached(request(salt="other")) == 0

    with_engine(check)


def test_prefix_cache_can_be_turned_off() -> None:
    """Without blocks nothing is found."""

    async def check(engine: SimulatedEngine) -> None:
        await collect(engine, request())
        assert (await collect(engine, request()))[0].cached_tokens == 0

    with_engine(check, cache_blocks=0)


def test_least_recently_used_blocks_are_forgotten_from_the_chains_end() -> None:
    """Of a chain, the beginning stays longest; what was used last stays whole."""
    old, new = (block_hashes(list(range(64)), salt, 16) for salt in ("old", "new"))
    cache = PrefixCache(6)
    cache.add(old)
    cache.add(new)
    assert cache.match(new) == 4
    assert cache.match(old) == 2


def test_requests_beyond_the_slots_wait_and_an_abort_frees_one() -> None:
    """With two slots taken by readers that do not finish, a third request runs once one of them leaves."""

    async def check(engine: SimulatedEngine) -> None:
        holders = [engine.generate(request(seed=seed)) for seed in (1, 2)]
        for holder in holders:
            await anext(holder)
        third = asyncio.create_task(collect(engine, request(seed=3, max_tokens=1)))
        await asyncio.sleep(4 * STEP_S)
        assert not third.done()
        await holders[0].aclose()
        assert len(await third) == 1
        await holders[1].aclose()

    with_engine(check, max_num_seqs=2, time_scale=1.0)


def test_steps_are_shared() -> None:
    """32 requests of 20 tokens take about as long as one: batching, not turns."""

    async def check(engine: SimulatedEngine) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        await asyncio.gather(*(collect(engine, request(seed=seed, max_tokens=20)) for seed in range(32)))
        took = clock() - began
        assert 20 * STEP_S <= took < 10 * 20 * STEP_S

    with_engine(check, time_scale=1.0)


def test_prefill_takes_time_for_uncached_tokens_only() -> None:
    """5,000 tokens at 25,000 a second are 0.2 s, and nothing when they are cached."""

    async def check(engine: SimulatedEngine) -> None:
        long = request(list(range(5000)), max_tokens=1)
        cold, warm = [(await collect(engine, long))[0].prefill_s for _ in range(2)]
        assert cold is not None
        assert warm is not None
        assert cold >= 0.2 > warm + 0.1

    with_engine(check, time_scale=1.0)


def test_stop_ends_running_requests() -> None:
    """Their readers are told, and so are those who come later."""

    async def check(engine: SimulatedEngine) -> None:
        reader = engine.generate(request())
        await anext(reader)
        await engine.stop()
        with pytest.raises(EngineDead):
            async for _ in reader:
                pass
        with pytest.raises(EngineDead):
            await collect(engine, request())

    with_engine(check, time_scale=1.0)


def test_created_from_settings() -> None:
    """The settings reach it; an unknown option is a configuration error."""
    group = EngineGroup(kind="simulated", model="org/name", max_num_seqs=3, options={"block_size": 32})
    engine = create_engine(Settings(engine=group))
    assert isinstance(engine, SimulatedEngine)
    assert engine.model == "name"
    assert (engine.limits.max_num_seqs, engine.limits.block_size) == (3, 32)
    with pytest.raises(ConfigurationError, match="colour"):
        create_engine(Settings(engine=EngineGroup(kind="simulated", options={"colour": "red"})))


def test_missing_vllm_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setattr("worker_gpu.engines.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match="pip install"):
        create_engine(Settings())
