"""What this worker's KV cache holds, known exactly from the engine's own events (docs/kv-cache.md)."""

from __future__ import annotations

from worker_gpu.cache.index import CacheFacts, CacheIndex

__all__ = ["CacheFacts", "CacheIndex"]
