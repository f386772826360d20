"""How fast the slower tiers are, from what vLLM tells of its steps."""

from __future__ import annotations

from typing import Any

import pytest

from worker_gpu.engines.base import TierRates
from worker_gpu.engines.tier_rates import DISK_GUESS, MEMORY_TOKENS, RAM_GUESS, MeasuredRates


def told(load_s: float = 0.0, read_s: float = 0.0) -> dict[str, Any]:
    """Return a step's figures of vLLM's connector."""
    return {
        "data": {
            "vllm:kv_offload_load_time": {(): load_s},
            "vllm:kv_offload_tiering_read_time": {("1:DiskTier",): read_s},
            "vllm:kv_offload_tiering_chunk_hits": {("0:primary",): 7},
        }
    }


def test_no_tier_has_no_rate() -> None:
    """Whatever vLLM says."""
    rates = MeasuredRates(ram=False, disk=False)
    rates.add({"host": 100}, told(1.0))
    assert rates.rates == TierRates(0.0, 0.0)


def test_rates_are_guessed_until_something_was_loaded() -> None:
    """A step without a load changes nothing."""
    rates = MeasuredRates(ram=True, disk=True)
    rates.add({}, None)
    rates.add({}, told())
    assert rates.rates.ram == pytest.approx(RAM_GUESS)
    assert rates.rates.disk == pytest.approx(DISK_GUESS)


def test_what_comes_from_disk_goes_both_ways() -> None:
    """Tokens and times are told with different steps. A thousand tokens from RAM and a thousand from disk, all copied to the GPU
    in 0.2 s; the reading took 0.4 s: 10,000 a second from RAM, and 2,000 from disk.
    """
    rates = MeasuredRates(ram=True, disk=True)
    rates.add({"host": 1000, "disk": 1000}, told(read_s=0.4))
    rates.add({}, told(load_s=0.2))
    assert rates.rates.ram == pytest.approx(10_000, rel=0.01)
    assert rates.rates.disk == pytest.approx(2_000, rel=0.01)


def test_old_figures_fade() -> None:
    """A disk that has become slow is known to be slow."""
    rates = MeasuredRates(ram=True, disk=False)
    rates.add({"host": 1_000_000}, told(1.0))
    for _ in range(10):
        rates.add({"host": int(MEMORY_TOKENS)}, told(2.0))
    assert rates.rates.ram == pytest.approx(MEMORY_TOKENS / 2.0, rel=0.01)
