"""How fast KV blocks come back from the tiers below the GPU, in tokens a second: a part of what a request costs here.

vLLM tells with each step how many prompt tokens came from which tier, how long the copies from host RAM to the GPU took, and how
long the reads from disk to host RAM. What was loaded from disk has gone both ways. Old figures fade: half of a
figure's weight is gone when as many tokens again have been loaded as `MEMORY_TOKENS`.

Until something was loaded the rates are guesses. They are high rather than low, because a rate that keeps requests away from a
tier is never corrected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker_gpu.engines.base import TierRates

#: A model of 8 billion parameters has 128 KiB a token: over PCIe at 25 GB/s, and from NVMe at 3 GB/s.
RAM_GUESS, DISK_GUESS = 190_000.0, 23_000.0
MEMORY_TOKENS = 200_000.0
#: vLLM's names.
_LOAD_TIME = "vllm:kv_offload_load_time"
_READ_TIME = "vllm:kv_offload_tiering_read_time"


class _Cost:
    """Seconds a token, of a decaying sum of both."""

    def __init__(self, guess: float) -> None:
        self._tokens, self._seconds, self._guess = 0.0, 0.0, 1 / guess

    def add(self, tokens: float, seconds: float) -> None:
        """Count what was loaded."""
        kept = 0.5 ** (tokens / MEMORY_TOKENS)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + seconds

    @property
    def seconds(self) -> float:
        """Return the seconds that one token takes."""
        return self._seconds / self._tokens if self._tokens and self._seconds else self._guess


class MeasuredRates:
    """The rates of an engine that has these tiers, from what its scheduler tells."""

    def __init__(self, *, ram: bool, disk: bool) -> None:
        self._has_ram, self._has_disk = ram, disk
        self._ram = _Cost(RAM_GUESS)
        self._disk = _Cost(1 / (1 / DISK_GUESS - 1 / RAM_GUESS))

    @property
    def rates(self) -> TierRates:
        """Return the rates by now."""
        return TierRates(
            1 / self._ram.seconds if self._has_ram else 0.0,
            1 / (self._ram.seconds + self._disk.seconds) if self._has_disk else 0.0,
        )

    def add(self, hits_by_source: Mapping[Any, int], connector: Mapping[str, Any] | None) -> None:
        """Count what one step tells: tokens by their source, and the connector's figures."""
        data = (connector or {}).get("data", {})
        if hits_by_source or data:
            self._ram.add(sum(hits_by_source.values()), _sum(data, _LOAD_TIME))
            self._disk.add(sum(n for source, n in hits_by_source.items() if source == "disk"), _sum(data, _READ_TIME))


def _sum(data: Mapping[str, Any], name: str) -> float:
    """Return a counter, added up over its labels."""
    return float(sum(data.get(name, {}).values()))
