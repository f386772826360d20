"""What the real engine tells of its KV cache: the events of one EngineCore after another, and the names of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tasks.logs import get_logger
from worker_gpu.engines.kv_events import AllBlocksCleared, KvEvent, KvEvents
from worker_gpu.engines.vllm_events import EventReader, is_readable
from worker_gpu.engines.vllm_hashes import BlockHasher

logger = get_logger(__name__)
Call = Callable[..., object]


class VllmCache:
    """Numbers vLLM's events for subscribers, and knows by what names they call the blocks of a prompt."""

    def __init__(self) -> None:
        self.events = KvEvents()
        self._reader: EventReader | None = None
        self._hasher: BlockHasher | None = None
        self._tells_hits = False

    def prepare(self, config: Any, call_soon: Call) -> None:
        """Have an EngineCore that is started with this VllmConfig publish events, if they can be read.

        `call_soon(function, *arguments)` has a function called on the loop, from any thread.
        """
        from vllm.config import KVEventsConfig

        # What an EngineCore before this one held is gone.
        call_soon(self.events.publish, AllBlocksCleared())
        if is_readable(config):
            self._reader = EventReader(
                lambda events: call_soon(self._publish, events), lambda: call_soon(self.events.skip)
            )
            config.kv_events_config = KVEventsConfig(**self._reader.arguments())
        elif config.cache_config.enable_prefix_caching:
            logger.warning("what the KV cache holds is not known: its events are not to be read (docs/kv-cache.md)")

    def begin(self, config: Any) -> None:
        """Begin to read, now that EngineCore has begun to publish; `config` is its CacheConfig."""
        if self._reader is not None:
            self._hasher = BlockHasher(config.prefix_caching_hash_algo, config.block_size)
            self._reader.start()

    def end(self) -> None:
        """Read no more."""
        if self._reader is not None:
            self._reader.close()
        self._reader = self._hasher = None

    def block_hashes(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        """Return the names of a prompt's full blocks; none if events are not read."""
        return [] if self._hasher is None else self._hasher.names(token_ids, cache_salt)

    def tell_again(self) -> None:
        """Have each further prompt tell of the blocks that it finds: vLLM tells nobody what else there is."""
        self._tells_hits = True

    @property
    def request_arguments(self) -> dict[str, Any]:
        """Return the `extra_args` of a request's sampling parameters."""
        return {"kv_cache_report_mode": "full"} if self._tells_hits else {}

    def _publish(self, events: list[KvEvent]) -> None:
        for event in events:
            self.events.publish(event)
