"""The real engine on a tiny model: one engine for the whole module, because each start takes seconds.

The last two tests end it, so they must stay last.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from tasks.errors import ConfigurationError, EngineDead, EngineFailed, PromptTooLong
from tasks.job import Sampling
from tasks.settings import CachingGroup, EngineGroup, SchedulingGroup, Settings
from tests.tiny_model import CONTEXT, VOCABULARY, make_tiny_model
from worker_gpu.engines import create_engine, vllm
from worker_gpu.engines.base import Delta, GenerationRequest
from worker_gpu.engines.vllm import VllmEngine, engine_arguments, sampling_params

# In CI a missing vLLM fails these tests; elsewhere it skips them.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None and not os.environ.get("CI"), reason="vLLM is not installed"),
]

SLOTS = 16
WAIT_S = 60
PROMPT = [10 + index * 7 % 400 for index in range(100)]
T = TypeVar("T")


class Host:
    """An engine with the permanent event loop it needs, in a thread of its own."""

    def __init__(self, engine: VllmEngine) -> None:
        """Start the loop, not the engine."""
        self.engine = engine
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def run(self, work: Awaitable[T]) -> T:
        """Run a coroutine on the engine's loop and wait for it."""

        async def bounded() -> T:
            return await asyncio.wait_for(work, WAIT_S)

        return asyncio.run_coroutine_threadsafe(bounded(), self.loop).result()

    def ask(self, prompt: list[int] = PROMPT, **changes: Any) -> list[Delta]:
        """Run one request to its end."""
        return self.run(collect(self.engine.generate(request(prompt, **changes))))

    def check(self, work: Callable[[VllmEngine], Awaitable[None]]) -> None:
        """Run `work` with the engine on its loop."""
        self.run(work(self.engine))


def request(prompt: list[int] = PROMPT, *, name: str = "id", salt: str = "salt", **sampling: Any) -> GenerationRequest:
    """Return a request for 32 tokens of a fixed seed, unless told otherwise."""
    return GenerationRequest(name, prompt, Sampling(**{"max_tokens": 32, "seed": 1, **sampling}), salt)


async def collect(deltas: AsyncGenerator[Delta, None]) -> list[Delta]:
    """Read to the end."""
    return [delta async for delta in deltas]


def text(deltas: list[Delta]) -> str:
    """Return what the deltas say together."""
    return "".join(delta.text for delta in deltas)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Start the engine once; its settings in the environment do not outlive this module."""
    environment = dict(os.environ)
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    engine = create_engine(Settings(engine=EngineGroup(model=str(model), max_num_seqs=SLOTS, kv_cache_gib=0.25)))
    assert isinstance(engine, VllmEngine)
    host = Host(engine)
    try:
        host.run(engine.start())
        yield host
    finally:
        host.run(engine.stop())
        host.loop.call_soon_threadsafe(host.loop.stop)
        host.thread.join()
        host.loop.close()
        os.environ.clear()
        os.environ.update(environment)


# --- How settings become arguments: no engine is needed -------------------------------------------


def test_options_override_every_other_setting() -> None:
    """An operator has the last word on what vLLM gets."""
    group = EngineGroup(model="org/name", revision="abc", max_model_len=512, options={"dtype": "half", "seed": 3})
    arguments = engine_arguments(Settings(engine=group, scheduling=SchedulingGroup(max_batch_tokens=640)), on_cpu=True)
    assert (arguments["model"], arguments["revision"], arguments["max_model_len"]) == ("org/name", "abc", 512)
    assert (arguments["dtype"], arguments["seed"], arguments["max_num_batched_tokens"]) == ("half", 3, 640)
    assert arguments["block_size"] % 32 == 0


def test_accelerators_get_vllms_own_defaults() -> None:
    """Block size, compilation and memory are set for the CPU only."""
    arguments = engine_arguments(Settings(engine=EngineGroup(kv_cache_gib=1)), on_cpu=False)
    assert not {"block_size", "enforce_eager", "kv_cache_memory_bytes"} & arguments.keys()
    assert arguments["dtype"] == "auto"


def test_either_caching_setting_turns_prefix_caching_off() -> None:
    """Both must be on for it."""
    for changes in ({"kv_cache_enabled": False}, {"static_prefix_caching": False}):
        assert not engine_arguments(Settings(caching=CachingGroup(**changes)), on_cpu=False)["enable_prefix_caching"]
    assert engine_arguments(Settings(), on_cpu=False)["enable_prefix_caching"]


def test_our_plugin_joins_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_PLUGINS is an exclusive list; unset, it lets all plugins in."""
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
    for given, result in (("theirs", "theirs,metaqore_no_orphans"), ("", "metaqore_no_orphans")):
        monkeypatch.setenv("VLLM_PLUGINS", given)
        vllm._set_environment(Settings())
        assert os.environ["VLLM_PLUGINS"] == result
    monkeypatch.delenv("VLLM_PLUGINS")
    vllm._set_environment(Settings())
    assert "VLLM_PLUGINS" not in os.environ


def test_sampling_reaches_vllm_unchanged() -> None:
    """Each parameter has its counterpart; a top_k of 0 means no limit to both."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed")
    for sampling in (
        Sampling(seed=0),
        Sampling(
            max_tokens=7,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.1,
            presence_penalty=-1.5,
            frequency_penalty=1.5,
            stop=("a", "b"),
            seed=2**63 - 1,
        ),
    ):
        params = sampling_params(sampling)
        assert {name: getattr(params, name) for name in names} == sampling.model_dump(include=set(names))
        assert params.stop == list(sampling.stop)


# --- The running engine ---------------------------------------------------------------------------


def test_stream_is_what_vllm_says_in_one_piece(host: Host) -> None:
    """The joined deltas are vLLM's own text, though single tokens are parts of characters."""
    from vllm.sampling_params import RequestOutputKind

    job = request(max_tokens=200)

    async def whole() -> Any:
        params = sampling_params(job.sampling)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        output = await anext(host.engine._llm.generate({"prompt_token_ids": PROMPT}, params, "whole"))
        return output.outputs[0]

    deltas, expected = host.run(collect(host.engine.generate(job))), host.run(whole())
    assert text(deltas) == expected.text
    assert deltas[-1].output_tokens == len(expected.token_ids) == 200
    assert len(deltas) > 100
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert deltas[-1].finish_reason == "length"


def test_limits_are_the_models_and_ours(host: Host) -> None:
    """The context window comes from the checkpoint, the slots from the settings."""
    limits = host.engine.limits
    assert (limits.max_model_len, limits.max_num_seqs, limits.block_size) == (CONTEXT, SLOTS, 32)


def test_second_request_finds_whole_blocks(host: Host) -> None:
    """Of 100 shared tokens, three blocks of 32 are found; another salt finds none."""
    first, second = host.ask(salt="a"), host.ask([*PROMPT, 11, 12], salt="a")
    assert {delta.cached_tokens for delta in first} == {0}
    assert {delta.cached_tokens for delta in second} == {96}
    assert {delta.cached_tokens for delta in host.ask(salt="b")} == {0}


def test_prefill_time_is_known_from_the_first_delta(host: Host) -> None:
    """It is positive, and does not change."""
    times = {delta.prefill_s for delta in host.ask()}
    assert len(times) == 1
    assert 0 < (times.pop() or 0) < 5


def test_same_seed_same_text(host: Host) -> None:
    """Another seed gives another text."""
    assert text(host.ask(seed=5)) == text(host.ask(seed=5)) != text(host.ask(seed=6))


def test_stop_string_ends_the_answer_and_is_not_part_of_it(host: Host) -> None:
    """The text before it is what it would have been."""
    free = text(host.ask(max_tokens=64))
    stop = next(
        piece for piece in (free[at : at + 4] for at in range(len(free) // 2, len(free))) if "\ufffd" not in piece
    )
    deltas = host.ask(max_tokens=64, stop=(stop,))
    assert text(deltas) == free[: free.index(stop)]
    assert deltas[-1].finish_reason == "stop"


def test_errors_do_not_quote_the_prompt(host: Host) -> None:
    """VLLM names a token id outside the vocabulary; we do not, not even as a cause. The engine goes on."""
    with pytest.raises(EngineFailed) as caught:
        host.ask([10, 11, VOCABULARY + 4242])
    assert str(VOCABULARY + 4242) not in str(caught.value)
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None
    host.run(host.engine.check_health())
    assert host.ask(max_tokens=1)


def test_prompt_without_room_is_refused(host: Host) -> None:
    """A prompt as long as the context window leaves no token for the answer."""
    with pytest.raises(PromptTooLong):
        host.ask([10] * CONTEXT)
    assert host.ask([10] * (CONTEXT - 1))[-1].output_tokens == 1


def test_requests_are_batched(host: Host) -> None:
    """All of 16 have their first token before any of them has its last."""
    events: list[tuple[int, bool]] = []

    async def read(number: int) -> None:
        async for delta in host.engine.generate(request(name=f"batched-{number}", max_tokens=100)):
            if not delta.finish_reason:
                events.append((number, False))  # noqa: PERF401
        events.append((number, True))

    async def all_of_them(_: VllmEngine) -> None:
        await asyncio.gather(*(read(number) for number in range(SLOTS)))

    host.check(all_of_them)
    before_any_end = events[: next(index for index, (_, ended) in enumerate(events) if ended)]
    assert {number for number, _ in before_any_end} == set(range(SLOTS))


def test_closing_the_stream_frees_its_slot(host: Host) -> None:
    """With all slots taken a request waits; it runs as soon as one reader leaves, the others unfinished."""

    async def check(engine: VllmEngine) -> None:
        holders = [engine.generate(request(name=f"holder-{n}", max_tokens=1900)) for n in range(SLOTS)]
        await asyncio.gather(*(anext(holder) for holder in holders))
        waiting = asyncio.create_task(collect(engine.generate(request(name="waiting", max_tokens=2))))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await holders[0].aclose()
        assert (await asyncio.wait_for(waiting, 2))[-1].output_tokens == 2
        for holder in holders[1:]:
            assert (await anext(holder)).finish_reason is None
            await holder.aclose()
        assert not engine._llm.output_processor.has_unfinished_requests()

    host.check(check)


# --- Starting and ending; these tests must stay last ----------------------------------------------


def test_settings_vllm_refuses_stop_the_start(tmp_path: Path, host: Host) -> None:
    """The message is vLLM's own; nothing is started."""
    engine = VllmEngine(Settings(engine=EngineGroup(model=str(tmp_path), options={"no_such_option": 1})))
    with pytest.raises(ConfigurationError, match="no_such_option"):
        host.run(engine.start())
    with pytest.raises(EngineDead):
        host.run(engine.check_health())


def test_stop_ends_readers_and_processes(host: Host) -> None:
    """A running request raises EngineDead, EngineCore is gone; a second stop does nothing."""
    core = host.engine._processes[0]

    async def check(engine: VllmEngine) -> None:
        reader = engine.generate(request(max_tokens=1900))
        await anext(reader)
        rest = asyncio.create_task(collect(reader))
        await engine.stop()
        with pytest.raises(EngineDead):
            await rest
        for call in (engine.check_health(), collect(engine.generate(request()))):
            with pytest.raises(EngineDead):
                await call
        await engine.stop()

    host.check(check)
    assert not psutil.pid_exists(core.pid)


def test_death_of_the_engine_process_is_noticed(host: Host) -> None:
    """Started again, it serves; when EngineCore is killed, its readers and the health check raise EngineDead."""

    async def check(engine: VllmEngine) -> None:
        await engine.start()
        reader = engine.generate(request(max_tokens=1900))
        await anext(reader)
        os.kill(engine._processes[0].pid, signal.SIGKILL)
        with pytest.raises(EngineDead):
            await asyncio.wait_for(collect(reader), 10)
        with pytest.raises(EngineDead):
            await engine.check_health()
        await engine.stop()

    host.check(check)
