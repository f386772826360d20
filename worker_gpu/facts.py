"""What a worker says of itself: of its KV cache's room, in its wishes, and to people, in its reports."""

from __future__ import annotations

from typing import Any

from worker_gpu.admission import Admission, Memory
from worker_gpu.cache import CacheIndex
from worker_gpu.engines.base import Engine
from worker_gpu.heart import Heart


class Facts:
    """The facts of a worker that serves `model`, from its parts. Any thread may ask."""

    def __init__(self, model: str, engine: Engine, cache: CacheIndex, admission: Admission, heart: Heart) -> None:
        self._model = model
        self._engine, self._cache, self._admission, self._heart = engine, cache, admission, heart

    @property
    def memory(self) -> Memory:
        """Return what is known of the KV cache's room."""
        cache, rates = self._cache.facts, self._engine.tier_rates
        return Memory(cache.capacity_tokens, cache.free_tokens, rates.ram, rates.disk)

    def report(self) -> dict[str, Any]:
        """Return what a report says beside what the cache holds."""
        cache, wish = self._cache.facts, self._admission.wish(self._engine.load, self.memory)
        return {
            "state": self._heart.state,
            "model": self._model,
            "capacity_tokens": cache.capacity_tokens,
            "free_tokens": cache.free_tokens,
            "known_tokens": cache.known_tokens,
            "running": self._admission.in_hand,
            "load": wish.load,
            "prefill_rate": round(wish.prefill_rate),
            "ram_rate": round(wish.ram_rate),
            "disk_rate": round(wish.disk_rate),
            "queried_tokens": cache.queried_tokens,
            "hit_tokens": cache.hit_tokens,
        }
