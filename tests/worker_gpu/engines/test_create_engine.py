"""The engine that the settings name is made, or the start is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.errors import ConfigurationError
from tasks.settings import CachingGroup, EngineGroup, Settings
from tests.worker_gpu.engines.virtual_time import request, run_virtually
from worker_gpu.engines import create_engine
from worker_gpu.engines.simulated import SimulatedEngine


def test_created_from_settings() -> None:
    """The settings reach it; its own options come before them."""
    group = EngineGroup(kind="simulated", model="org/name", max_num_seqs=3, options={"block_size": 32})
    engine = create_engine(Settings(engine=group))
    assert isinstance(engine, SimulatedEngine)
    assert engine.model == "name"
    assert (engine.limits.max_num_seqs, engine.limits.block_size, engine.limits.max_model_len) == (3, 32, 8192)
    group = EngineGroup(kind="simulated", max_model_len=100, max_num_seqs=3, options={"max_num_seqs": 5})
    engine = create_engine(Settings(engine=group))
    assert (engine.limits.max_num_seqs, engine.limits.max_model_len) == (5, 100)


@pytest.mark.parametrize("off", ["kv_cache_enabled", "static_prefix_caching"])
def test_caching_is_turned_off_by_the_settings(off: str) -> None:
    """Either key does."""
    group = EngineGroup(kind="simulated", options={"time_scale": 0})
    engine = create_engine(Settings(engine=group, caching=CachingGroup.model_validate({off: False})))

    async def check() -> None:
        await engine.start()
        for _ in range(2):
            assert {delta.cached_tokens async for delta in engine.generate(request("same"))} == {0}
        await engine.stop()

    run_virtually(check())


@pytest.mark.parametrize("options", [{"colour": "red"}, {"answer_tokens": [9, 1]}, {"num_blocks": "secret"}])
def test_unknown_or_bad_options_are_configuration_errors(options: dict[str, Any]) -> None:
    """The message names them, and keeps their values to itself."""
    with pytest.raises(ConfigurationError, match=next(iter(options))) as caught:
        create_engine(Settings(engine=EngineGroup(kind="simulated", options=options)))
    assert "secret" not in caught.value.detail


def test_missing_vllm_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to install."""
    monkeypatch.setattr("worker_gpu.engines.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match="pip install"):
        create_engine(Settings())
