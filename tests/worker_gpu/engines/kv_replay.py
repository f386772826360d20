"""A reader of KV events, who knows of the cache only what they tell, and insists that they make sense."""

from __future__ import annotations

from worker_gpu.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent


class KvReplay:
    """Subscribe `apply` before the first event; `content` then holds the hash before each block that is cached."""

    def __init__(self) -> None:
        self.content: dict[bytes, bytes | None] = {}
        self.events: list[KvEvent] = []

    def apply(self, number: int, event: KvEvent) -> None:
        """Follow one event."""
        assert number == len(self.events)
        self.events.append(event)
        match event:
            case BlockStored():
                self._store(event)
            case BlockRemoved():
                for block_hash in event.block_hashes:
                    assert block_hash not in self.content.values(), "a block goes before the ones that follow it"
                    del self.content[block_hash]
            case AllBlocksCleared():
                self.content.clear()

    def _store(self, event: BlockStored) -> None:
        assert event.token_count == len(event.block_hashes) * event.block_size > 0
        parent = event.parent
        for block_hash in event.block_hashes:
            assert parent is None or parent in self.content
            assert block_hash not in self.content
            self.content[block_hash] = parent
            parent = block_hash
