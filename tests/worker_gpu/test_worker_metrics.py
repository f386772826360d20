"""What a worker tells: tokens and their times, its engine, and why attempts end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast, get_args

import pytest

from tasks.job import Sampling
from tasks.metrics import worker as metrics
from tasks.metrics.making import INSTRUMENTS
from tasks.metrics.shared import CODES
from tasks.settings import StreamingGroup
from worker_gpu import metrics as module
from worker_gpu.engines.base import Delta, EngineLoad, GenerationRequest
from worker_gpu.engines.simulated_batch import ContinuousBatch
from worker_gpu.engines.simulated_options import SimulationOptions
from worker_gpu.engines.tier_rates import MeasuredRates
from worker_gpu.engines.vllm_steps import StepCounter
from worker_gpu.scopes import Reason
from worker_gpu.streams import StreamWriter

TOLD = INSTRUMENTS["worker"]
SAMPLING = Sampling(max_tokens=4, seed=7)


def told(name: str, **labels: str) -> float:
    """Return what is told now."""
    return TOLD.get_sample_value(f"metaqore_{name}", labels) or 0.0


def test_a_frame_is_measured_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first begins the count; each later one tells the mean time of its tokens, those without text included."""
    clock = [100.0]
    monkeypatch.setattr("worker_gpu.request_stream.time", SimpleNamespace(monotonic=lambda: clock[0]))
    names = ("output_tokens_total", "inter_token_seconds_count", "inter_token_seconds_sum")
    before = {name: told(name) for name in names}

    async def stream() -> None:
        made = StreamWriter(cast("Any", None), "x:", StreamingGroup()).open("gw_1", b"k" * 32, 1)
        for after_s, text, counts in ((0, "word ", (1, 2)), (0.4, "word ", (3, 4, 5, 6)), (0.1, "", (7,)), (9, "", ())):
            clock[0] += after_s
            for count in counts:
                made.write(Delta(text, count, 0, None, None))
            made.cut()

    asyncio.run(stream())
    after = {name: told(name) - before[name] for name in names}
    assert after["output_tokens_total"] == 7
    assert after["inter_token_seconds_count"] == 2
    assert after["inter_token_seconds_sum"] == pytest.approx(0.4 / 4 + 0.1)


def test_a_first_token_is_measured_by_priority_and_cache() -> None:
    """And clocks that differ make no time less than nothing."""
    labels = {"priority": "high", "cache": "hit"}
    before = told("first_token_seconds_sum", **labels)
    computed, cached = told("prompt_tokens_total", source="computed"), told("prompt_tokens_total", source="cached")
    waited = told("queue_wait_seconds_sum", priority="high")
    metrics.begun("high", prompt_tokens=100, cached_tokens=64, waited_s=-0.5, first_token_s=1.5, prefill_s=None)
    assert told("first_token_seconds_sum", **labels) == before + 1.5
    assert told("queue_wait_seconds_sum", priority="high") == waited
    assert told("prompt_tokens_total", source="computed") - computed == 36
    assert told("prompt_tokens_total", source="cached") - cached == 64


def test_what_vllm_says_of_its_steps() -> None:
    """Reports come with either part or both; preemptions add up."""
    counter = StepCounter(MeasuredRates(ram=False, disk=False))
    no_tiers = {"connector_prefix_cache_stats": None, "kv_connector_stats": None}
    scheduler = SimpleNamespace(num_running_reqs=3, num_waiting_reqs=2, kv_cache_usage=0.5, **no_tiers)
    counter.record(scheduler, None)
    assert counter.load == EngineLoad(3, 2, 0.5, 0)
    counter.record(None, SimpleNamespace(num_preempted_reqs=2), mm_cache_stats=None, engine_idx=0)
    assert counter.load == EngineLoad(3, 2, 0.5, 2)
    counter.record(
        SimpleNamespace(num_running_reqs=0, num_waiting_reqs=0, kv_cache_usage=0.0, **no_tiers),
        SimpleNamespace(num_preempted_reqs=1),
    )
    assert counter.load == EngineLoad(0, 0, 0.0, 3)
    counter.record(None, None)
    assert (counter.load, counter.steps) == (EngineLoad(0, 0, 0.0, 3), 4)


def test_what_a_batch_has_to_do() -> None:
    """Sequences that run and wait, and the share of the cache that is held by them, not by what is only remembered."""
    batch = ContinuousBatch(SimulationOptions(max_num_seqs=1, num_blocks=64, block_size=16))
    assert batch.load == EngineLoad(0, 0, 0.0, 0)
    for number in range(2):
        batch.add(GenerationRequest(f"r{number}", list(range(160)), SAMPLING, "salt"))
    batch.step(0.0)
    load = batch.load
    assert (load.running, load.waiting) == (1, 1)
    assert load.kv_usage == pytest.approx(batch_blocks(160) / 64)
    for number in range(2):
        batch.abort(f"r{number}")
    assert batch.load == EngineLoad(0, 0, 0.0, 0)


def batch_blocks(tokens: int) -> int:
    """Return how many blocks so many tokens take, the next one's among them."""
    return -(-tokens // 16)


def test_why_attempts_end_is_known() -> None:
    """Every reason for which an attempt is given back is a code that is told as it is; the others are recorded as none."""
    assert set(get_args(Reason)) - CODES == {"superseded", "republished"}


def test_the_workers_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of use once its model is loaded, until its engine is dead, its loop does not turn, or it has ended."""
    monkeypatch.setattr(module, "_LOOP_S", 0.2)
    heart = SimpleNamespace(state="loading")
    parts = cast("Any", SimpleNamespace(heart=heart))

    async def look() -> list[str | None]:
        loop = asyncio.get_running_loop()
        seen = []
        for state in ("loading", "ready", "draining", "dead"):
            heart.state = state
            seen.append(await asyncio.to_thread(module._wrong, parts, loop))
        heart.state = "ready"
        # Asked on the loop itself, which cannot turn meanwhile.
        seen.append(module._wrong(parts, loop))
        return seen

    loading, ready, draining, dead, stuck = asyncio.run(look())
    assert (loading, ready, draining) == ("the model is being loaded", None, None)
    assert dead == "the engine is of no use any more"
    assert stuck is not None
    loop = asyncio.new_event_loop()
    loop.close()
    assert module._wrong(parts, loop) == "the worker has ended"
