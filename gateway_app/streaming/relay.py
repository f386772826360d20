"""One reader a gateway process, for however many clients watch.

A thread blocks in a single XREAD over all watched streams and hands each entry to the subscriptions it is for. To add
a stream it must be woken: it also reads a small stream of its own, to which `subscribe` adds an entry. So Redis sees
two connections from a gateway process, whether it has one client or a thousand.

A subscription holds a bounded number of entries. A client slower than that is dropped from the reader, and taken up
again at its own position once it has caught up: Redis keeps the stream, so nothing need be held for it here.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections import defaultdict
from typing import Any, cast

import redis

from tasks.stream import FIELD, Cursor, stream_key

logger = logging.getLogger(__name__)

Entry = tuple[Cursor, bytes]
#: A stream entry as redis-py returns it to a client that does not decode.
RawEntry = tuple[bytes, dict[bytes, bytes]]
#: How long one read waits for news. The reading client's socket must be allowed to wait longer.
BLOCK_S = 5.0
_RETRY_S = 0.5
_COUNT = 256
_CONTROL_TTL_S = 3600


class Subscription:
    """One client's view of one stream, from its cursor on."""

    def __init__(self, relay: Relay, key: str, cursor: Cursor, limit: int) -> None:
        self.key = key
        self.read_to = cursor
        self._delivered = cursor
        self._relay = relay
        self._limit = limit
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._attached = False

    @property
    def held(self) -> int:
        """Return how many entries wait for the client."""
        return self._entries.qsize()

    def next(self, timeout_s: float) -> Entry | None:
        """Return the next entry, or None if none came within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not self._attached:
                self.read_to, self._attached = self._delivered, True
                self._relay.attach(self)
            try:
                entry = self._entries.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if entry is not None:
                self._delivered = entry[0]
                return entry
            # The reader dropped us here. All that it gave before has been taken, so it may begin again.
            self._attached = False

    def offer(self, entry: Entry) -> bool:
        """Take an entry from the reader. Returns False if the client is too slow and must be dropped for now."""
        if entry[0] <= self.read_to:
            return True
        if self._entries.qsize() >= self._limit:
            self._entries.put(None)
            return False
        self.read_to = entry[0]
        self._entries.put(entry)
        return True

    def close(self) -> None:
        """Stop watching."""
        self._relay.detach(self)


class Relay:
    """The reader. `client` is used by its thread alone; `waker` is shared."""

    def __init__(self, client: redis.Redis, waker: redis.Redis, prefix: str, buffer_frames: int) -> None:
        self._client = client
        self._waker = waker
        self._prefix = prefix
        self._limit = buffer_frames
        self._control = f"{prefix}relay:{uuid.uuid4().hex}"
        self._lock = threading.Lock()
        self._watched: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._thread: threading.Thread | None = None
        self._closing = False

    def subscribe(self, request_id: str, cursor: Cursor) -> Subscription:
        """Return a subscription to the request's stream, after `cursor`. Close it when done."""
        return Subscription(self, stream_key(self._prefix, request_id), cursor, self._limit)

    def attach(self, subscription: Subscription) -> None:
        """Have the reader feed `subscription`."""
        with self._lock:
            self._watched[subscription.key].add(subscription)
            if self._thread is None or not self._thread.is_alive():
                # Started with the first client: a server that forks its workers must not have forked this thread.
                self._thread = threading.Thread(target=self._read_forever, name="stream-relay", daemon=True)
                self._thread.start()
        self._wake()

    def detach(self, subscription: Subscription) -> None:
        """Stop feeding `subscription`."""
        with self._lock:
            self._drop(subscription)

    def close(self) -> None:
        """End the reader."""
        self._closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()

    def _drop(self, subscription: Subscription) -> None:
        watchers = self._watched.get(subscription.key)
        if watchers is not None:
            watchers.discard(subscription)
            if not watchers:
                del self._watched[subscription.key]

    def _wake(self) -> None:
        try:
            with self._waker.pipeline(transaction=False) as pipe:
                pipe.xadd(self._control, {"w": b""}, maxlen=1)
                pipe.expire(self._control, _CONTROL_TTL_S)
                pipe.execute()
        except redis.RedisError:
            # The reader meets the same fault and reads the new set when it comes back.
            logger.warning("stream relay could not be woken; it looks again within %.0f s", BLOCK_S)

    def _read_forever(self) -> None:
        position = "0-0"
        failing = False
        while not self._closing:
            with self._lock:
                wanted = {
                    key: min(subscription.read_to for subscription in watchers)
                    for key, watchers in self._watched.items()
                }
            positions: dict[Any, Any] = {self._control: position, **{key: str(at) for key, at in wanted.items()}}
            try:
                answer = self._client.xread(positions, count=_COUNT, block=int(BLOCK_S * 1000))
            except redis.RedisError as error:
                if not failing:
                    logger.warning("stream relay lost Redis: %s", type(error).__name__)
                failing = True
                time.sleep(_RETRY_S)
                continue
            if failing:
                logger.info("stream relay reached Redis again")
                failing = False
            for raw_key, entries in cast("list[tuple[bytes, list[RawEntry]]]", answer or []):
                key = raw_key.decode()
                if key == self._control:
                    position = entries[-1][0].decode()
                else:
                    self._deliver(key, wanted[key], entries)

    def _deliver(self, key: str, after: Cursor, entries: list[RawEntry]) -> None:
        """Hand over the entries that follow `after`."""
        with self._lock:
            for subscription in tuple(self._watched.get(key, ())):
                if subscription.read_to < after:
                    # It came while these were being read, and lacks what lies before them: the next read is for it too.
                    continue
                for raw_id, fields in entries:
                    if not subscription.offer((Cursor.parse(raw_id.decode()), fields[FIELD])):
                        self._drop(subscription)
                        break
