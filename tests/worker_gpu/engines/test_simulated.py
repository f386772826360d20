"""The simulated engine keeps the promises that load tests rely on."""

from __future__ import annotations

import asyncio

import pytest

from tasks.errors import EngineDead, PromptTooLong, Unsupported
from tasks.job import ResponseFormat
from tests.worker_gpu.engines.engine_runs import collect, request, running, with_engine
from tests.worker_gpu.engines.kv_replay import KvReplay
from tests.worker_gpu.engines.virtual_time import PROMPT
from worker_gpu.engines.block_hashes import block_hashes
from worker_gpu.engines.simulated import SimulatedEngine
from worker_gpu.engines.simulated_options import STEP_S


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


def test_choices_come_mixed_and_each_ends_once() -> None:
    """The counts are those of all together, and of the prompt there is one."""

    async def check(engine: SimulatedEngine) -> None:
        deltas = await collect(engine, request(n=3))
        assert [delta.output_tokens for delta in deltas] == list(range(1, len(deltas) + 1))
        assert [delta.choice for delta in deltas[:6]] == [0, 1, 2, 0, 1, 2]
        assert sorted(delta.choice for delta in deltas if delta.finish_reason) == [0, 1, 2]
        texts = {"".join(delta.text for delta in deltas if delta.choice == choice) for choice in range(3)}
        assert len(texts) == 3
        assert {(delta.cached_tokens, delta.prefill_s) for delta in deltas} == {(0, 0.0)}

    with_engine(check)


def test_stop_strings_end_an_answer() -> None:
    """The text ends before it, wherever in a token it begins."""

    async def check(engine: SimulatedEngine) -> None:
        text = "".join(delta.text for delta in await collect(engine, request()))
        stop = text[50:57]
        deltas = await collect(engine, request(stop=(stop,)))
        assert "".join(delta.text for delta in deltas) == text[: text.index(stop)]
        assert deltas[-1].finish_reason == "stop"

    with_engine(check)


def test_log_probabilities_come_only_if_asked_for() -> None:
    """One for each token, with as many alternatives as wanted."""

    async def check(engine: SimulatedEngine) -> None:
        assert not any(delta.logprobs for delta in await collect(engine, request()))
        for delta in await collect(engine, request(logprobs=3)):
            (logprob,) = delta.logprobs
            assert (logprob.token, len(logprob.top)) == (delta.text, 3)

    with_engine(check)


def test_refusals_reach_the_caller() -> None:
    """And leave the engine as it was."""

    async def check(engine: SimulatedEngine) -> None:
        with pytest.raises(Unsupported):
            await collect(engine, request(response_format=ResponseFormat(type="json_object")))
        twice = request()
        reader = engine.generate(twice)
        await anext(reader)
        with pytest.raises(ValueError, match="is running"):
            await collect(engine, twice)
        assert (await anext(reader)).output_tokens == 2
        # Closed within a step, whose token must not reach the next reader of that id.
        await reader.aclose()
        again = await collect(engine, twice)
        assert [delta.text for delta in again] == [delta.text for delta in await collect(engine, request())]

    with_engine(check)


def test_events_tell_what_is_cached() -> None:
    """Whoever subscribes before the start knows every block by its hash."""

    async def check(engine: SimulatedEngine) -> None:
        replay = KvReplay()
        engine.subscribe(replay.apply)
        await collect(engine, request(max_tokens=1))
        assert list(replay.content) == block_hashes(PROMPT, "salt", 16)

    with_engine(check)


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


def test_an_engine_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in a step ends the engine: readers and the health check are told."""

    async def check(engine: SimulatedEngine) -> None:
        def fail(_: float) -> None:
            raise RuntimeError

        monkeypatch.setattr(engine._batch, "step", fail)
        with pytest.raises(EngineDead):
            await collect(engine, request())
        with pytest.raises(EngineDead):
            await engine.check_health()

    with_engine(check)
