"""vLLM's KV events, read from EngineCore's socket without missing any.

EngineCore publishes the events of each step as one numbered batch, over ZeroMQ, and forgets it; a thread of its own reads
them here. Batches are lost where a queue between the two is full, and before the two are connected. A number that is skipped
tells of it, and so does asking, when it has been quiet, whether there was more. EngineCore keeps the last batches, and sends
them again when asked by number. What it no longer has is lost for good: `lost` is called, and nothing is known of the cache
until it is told again (see `Engine.tell_again`).

The sockets are files in a folder that only this user can open: events contain prompts. Their token ids are not read here.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tasks.logs import get_logger
from worker_gpu.engines.kv_events import CPU, DISK, GPU, AllBlocksCleared, BlockRemoved, BlockStored, KvEvent
from worker_gpu.engines.vllm_hashes import name_of

logger = get_logger(__name__)

TOPIC = b"kv"
#: Batches that EngineCore keeps. It could not send more at once: ZeroMQ holds 1,000 messages a connection, and drops others.
KEPT_BATCHES = 1000
#: After so long without an event EngineCore is asked whether there was one.
QUIET_MS = 2000
#: How often the thread looks whether it is to end.
POLL_MS = 200
#: So long it may take to answer.
ANSWER_MS = 5000
#: A socket's path may have 107 characters, and its folder's and file's names need 40.
_LONGEST_FOLDER = 60
_SHORT = "/tmp"  # noqa: S108  mkdtemp makes a folder in it that is nobody else's
_MEDIA = {None: GPU, "GPU": GPU, "CPU": CPU, "STORAGE": DISK}
#: Of a model with several kinds of attention, those blocks that hold all of a prompt, as a prefix needs them.
_WHOLE = (None, "full_attention", "mla_attention", "sink_full_attention")


class _Stored(msgspec.Struct, tag="BlockStored"):
    block_hashes: list[int | bytes]
    parent_block_hash: int | bytes | None = None
    block_size: int = 0
    medium: str | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None


class _Removed(msgspec.Struct, tag="BlockRemoved"):
    block_hashes: list[int | bytes]
    medium: str | None = None
    group_idx: int | None = None


class _Cleared(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class _Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[_Stored | _Removed | _Cleared]


class EventDecoder:
    """Turns vLLM's batches into events.

    A model with several kinds of attention has several groups of blocks, which know a prompt by the same hashes. What is
    cached is told by the first group that keeps all of a prompt, so for such models it is an estimate.
    """

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(_Batch)
        self._group: int | None = None

    def decode(self, payload: bytes) -> list[KvEvent]:
        """Return the events of a batch. Raises msgspec.MsgspecError if it is none."""
        return [event for each in self._decoder.decode(payload).events if (event := self._event(each)) is not None]

    def _event(self, event: _Stored | _Removed | _Cleared) -> KvEvent | None:
        if isinstance(event, _Cleared):
            # So vLLM says when it forgets what is on the GPU, where the slower tiers are asked apart.
            return AllBlocksCleared(GPU)
        medium = _MEDIA.get(event.medium)
        if isinstance(event, _Stored) and self._group is None and event.kv_cache_spec_kind in _WHOLE:
            self._group = event.group_idx
        if medium is None or event.group_idx not in (None, self._group):
            return None
        names = tuple(map(name_of, event.block_hashes))
        if isinstance(event, _Removed):
            return BlockRemoved(names, medium)
        parent = None if event.parent_block_hash is None else name_of(event.parent_block_hash)
        return BlockStored(names, parent, len(names) * event.block_size, event.block_size, medium)


class EventReader:
    """Reads the events of one EngineCore. `take` is called with those of each batch, `lost` where some are missing.

    Both are called from the reader's thread.
    """

    def __init__(self, take: Callable[[list[KvEvent]], object], lost: Callable[[], object]) -> None:
        self._take, self._lost = take, lost
        self._decoder = EventDecoder()
        self._next = 0
        root = tempfile.gettempdir()
        self._folder = Path(
            tempfile.mkdtemp(prefix="metaqore-kv-", dir=root if len(root) < _LONGEST_FOLDER else _SHORT)
        )
        self._endpoint, self._replay_endpoint = (f"ipc://{self._folder}/{name}" for name in ("events", "replay"))
        self._context = zmq.Context()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._read, name="kv-events", daemon=True)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of vLLM's KVEventsConfig that have EngineCore publish its events to this reader."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": self._endpoint,
            "replay_endpoint": self._replay_endpoint,
            "buffer_steps": KEPT_BATCHES,
            "topic": TOPIC.decode(),
        }

    def start(self) -> None:
        """Begin to read; EngineCore must have begun to publish."""
        self._thread.start()

    def close(self) -> None:
        """Read no more, and remove the sockets. May be called again."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self) -> None:
        events = self._context.socket(zmq.SUB)
        events.set_hwm(0)
        events.connect(self._endpoint)
        events.subscribe(TOPIC)
        # What was published so far, nobody received.
        self._catch_up()
        while not self._ending.is_set():
            if self._comes(events, QUIET_MS):
                _, number, payload = events.recv_multipart()
                self._follow(int.from_bytes(number, "big"), payload)
            else:
                self._catch_up()
        events.close(linger=0)

    def _follow(self, number: int, payload: bytes) -> None:
        """Pass a batch on, after those before it. One that was passed on already has been asked for."""
        if number > self._next:
            self._catch_up()
        if number >= self._next:
            self._pass_on(number, payload)

    def _catch_up(self) -> None:
        """Ask EngineCore for all from the next batch on, and pass on what it has. If it does not answer, that is nothing."""
        replay = self._context.socket(zmq.DEALER)
        replay.set_hwm(0)
        replay.connect(self._replay_endpoint)
        replay.send_multipart((b"", self._next.to_bytes(8, "big")))
        while self._comes(replay, ANSWER_MS):
            _, _, number, payload = replay.recv_multipart()
            if not payload:
                break
            if (at := int.from_bytes(number, "big")) >= self._next:
                self._pass_on(at, payload)
        replay.close(linger=0)

    def _comes(self, socket: zmq.Socket[bytes], timeout_ms: int) -> bool:
        """Wait for a message; tell whether there is one. There is none when the reader ends."""
        for _ in range(0, timeout_ms, POLL_MS):
            if self._ending.is_set():
                return False
            if socket.poll(POLL_MS):
                return True
        return False

    def _pass_on(self, number: int, payload: bytes) -> None:
        if number > self._next:
            logger.warning("KV events were lost", count=number - self._next)
            self._lost()
        self._next = number + 1
        try:
            events = self._decoder.decode(payload)
        except msgspec.MsgspecError as error:
            # Its text may quote the batch, which has prompts in it.
            logger.error("KV events cannot be read", error=type(error).__name__)
            self._lost()
        else:
            self._take(events)


def is_readable(config: Any) -> bool:
    """Tell whether an EventReader can read the events of an engine with this VllmConfig.

    It cannot where nothing is cached, where the operator has the events published for himself, and where several
    EngineCores run side by side, each with a cache of its own, of which vLLM chooses one for each request.
    """
    return bool(
        config.cache_config.enable_prefix_caching
        and (config.kv_events_config is None or not config.kv_events_config.enable_kv_cache_events)
        and config.parallel_config.data_parallel_size == 1
    )
