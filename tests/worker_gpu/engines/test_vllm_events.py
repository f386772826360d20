"""Reading vLLM's KV events as its own publisher sends them, without an engine; some get lost on the way."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.services import wait_until
from worker_gpu.engines.kv_events import CPU, DISK, GPU, AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

pytestmark = pytest.mark.vllm

HASH = bytes(range(32))


class Wire:
    """A publisher of vLLM's and a reader of ours; `heard` are the events that came, and None where some were lost."""

    def __init__(self, kept: int = 100) -> None:
        from vllm.distributed.kv_events import ZmqEventPublisher

        from worker_gpu.engines.vllm_events import EventReader

        self.heard: list[KvEvent | None] = []
        self.reader = EventReader(self.heard.extend, lambda: self.heard.append(None))
        arguments = {**self.reader.arguments(), "buffer_steps": kept}
        del arguments["enable_kv_cache_events"], arguments["publisher"]
        self.publisher = ZmqEventPublisher(0, **arguments)

    def publish(self, *numbers: int) -> None:
        """Publish a batch for each number, of one block that bears it."""
        for number in numbers:
            self.send(_stored(number))

    def send(self, *events: Any) -> None:
        from vllm.distributed.kv_events import KVEventBatch

        self.publisher.publish(KVEventBatch(ts=0.0, events=list(events)))

    def wait_for(self, *expected: int | None) -> None:
        """Wait until exactly these numbers were heard, in this order."""

        def numbers() -> list[int | None]:
            return [
                int.from_bytes(event.block_hashes[0], "big") if isinstance(event, BlockStored) else None
                for event in list(self.heard)
            ]

        wait_until(lambda: len(self.heard) >= len(expected), 30, "events")
        assert numbers() == list(expected)

    def close(self) -> None:
        self.reader.close()
        self.publisher.shutdown()


def _stored(number: int, **more: Any) -> Any:
    from vllm.distributed.kv_events import BlockStored

    fields = {"block_hashes": [number], "parent_block_hash": None, "token_ids": [1] * 32, "block_size": 32}
    return BlockStored(**{**fields, "lora_id": None, "medium": "GPU", "lora_name": None, **more})


@pytest.fixture
def wire() -> Iterator[Wire]:
    """Return a wire whose reader has not begun."""
    wire = Wire()
    yield wire
    wire.close()


def test_nothing_is_missed_before_the_connection(wire: Wire) -> None:
    """What was published before somebody listened is asked for, once; what comes then is heard as it comes."""
    wire.publish(1, 2, 3)
    wire.reader.start()
    wire.wait_for(1, 2, 3)
    wire.publish(4)
    wire.wait_for(1, 2, 3, 4)


def test_a_gap_is_filled(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that ZeroMQ drops are sent again, in their place; those that nothing follows are asked for, too."""
    follow = wire.reader._follow
    came: list[int] = []
    dropped: set[int] = set()

    def dropping(number: int, payload: bytes) -> None:
        came.append(number)
        if number not in dropped:
            follow(number, payload)

    monkeypatch.setattr(wire.reader, "_follow", dropping)
    monkeypatch.setattr("worker_gpu.engines.vllm_events.QUIET_MS", 400)
    wire.reader.start()
    numbers = count()

    def is_connected() -> bool:
        wire.publish(next(numbers))
        return bool(came)

    wait_until(is_connected, 30, "the connection")
    first = next(numbers)
    dropped |= {first, first + 1, first + 3}
    wire.publish(*range(first, first + 4))
    wire.wait_for(*range(first + 4))
    wait_until(lambda: dropped <= set(came), 30, "what was dropped")


def test_what_is_lost_for_good_is_told() -> None:
    """The publisher keeps its last two batches only."""
    wire = Wire(kept=2)
    try:
        wire.publish(*range(5))
        wait_until(lambda: wire.publisher._event_queue.empty() and len(wire.publisher._buffer) == 2, 30, "publishing")
        wait_until(lambda: wire.publisher._buffer[-1][0] == 4, 30, "publishing")
        wire.reader.start()
        wire.wait_for(None, 3, 4)
        wire.publish(5)
        wire.wait_for(None, 3, 4, 5)
    finally:
        wire.close()


def test_a_batch_that_cannot_be_read_is_lost(wire: Wire) -> None:
    """Of another vLLM, perhaps: the reader goes on."""
    wire.reader.start()
    wire.publish(0)
    wire.send({"type": "BlockStored", "block_hashes": "none"})
    wire.publish(2)
    wire.wait_for(0, None, 2)


def test_what_events_say(wire: Wire) -> None:
    """Names are the last 64 bits, whichever form the hash has; tiers have our words; blocks on disk may have no tokens."""
    from vllm.distributed import kv_events as vllm

    wire.send(
        _stored(7, block_hashes=[HASH, 7], parent_block_hash=HASH, token_ids=[1] * 64, group_idx=0),
        _stored(8, medium="STORAGE", token_ids=[], block_size=0, group_idx=0, ownership="disk"),
        vllm.BlockRemoved(block_hashes=[7, HASH], medium="CPU", group_idx=0, locality="LOCAL"),
        vllm.BlockRemoved(block_hashes=[7], medium="TAPE"),
        vllm.AllBlocksCleared(),
    )
    wire.reader.start()
    wait_until(lambda: len(wire.heard) >= 4, 30, "events")
    low, seven = HASH[-8:], (7).to_bytes(8, "big")
    assert wire.heard == [
        BlockStored((low, seven), low, 64, 32, GPU),
        BlockStored(((8).to_bytes(8, "big"),), None, 0, 0, DISK),
        BlockRemoved((seven, low), CPU),
        AllBlocksCleared(GPU),
    ]


def test_of_several_groups_one_counts(wire: Wire) -> None:
    """The one that keeps the whole prompt, not the one with a window."""
    from vllm.distributed import kv_events as vllm

    wire.send(
        _stored(1, group_idx=0, kv_cache_spec_kind="sliding_window"),
        _stored(1, group_idx=1, kv_cache_spec_kind="full_attention"),
        _stored(2, group_idx=2, kv_cache_spec_kind="full_attention"),
        vllm.BlockRemoved(block_hashes=[1], medium="GPU", group_idx=0),
    )
    wire.reader.start()
    wire.publish(3)
    wire.wait_for(1, 3)


def test_sockets_are_private_and_go(wire: Wire) -> None:
    """Events contain prompts, so nobody else may listen."""
    folder = Path(wire.reader._folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    wire.reader.start()
    wire.publish(0)
    wire.wait_for(0)
    wire.reader.close()
    assert not folder.exists()
    wire.reader.close()


@pytest.mark.parametrize(
    ("caching", "events", "ranks", "readable"),
    [
        (True, None, 1, True),
        (True, False, 1, True),
        (False, None, 1, False),
        (True, True, 1, False),
        (True, None, 2, False),
    ],
)
def test_when_events_can_be_read(caching: bool, events: bool | None, ranks: int, readable: bool) -> None:
    """Not without a cache, not if the operator publishes them, not of several engines side by side."""
    from worker_gpu.engines.vllm_events import is_readable

    config = SimpleNamespace(
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
        kv_events_config=None if events is None else SimpleNamespace(enable_kv_cache_events=events),
        parallel_config=SimpleNamespace(data_parallel_size=ranks),
    )
    assert is_readable(config) is readable


def test_hashes_that_only_the_engine_knows_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chains of xxhash begin with random bytes, unless PYTHONHASHSEED is set, which the engine inherits."""
    from worker_gpu.engines.vllm_hashes import BlockHasher

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    assert BlockHasher("xxhash", 4).names([1, 2, 3, 4], "salt") == []
    plain = BlockHasher("sha256_cbor", 4).names([1, 2, 3, 4], "salt")
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    seeded = BlockHasher("sha256_cbor", 4).names([1, 2, 3, 4, 5], "salt")
    assert len(plain) == len(seeded) == 1
    assert plain != seeded
