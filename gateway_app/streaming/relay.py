"""One reader a gateway process, for however many clients watch.

A thread blocks in a single XREAD over all watched streams and hands each entry to the subscriptions it is for. To add
a stream it must be woken: it also reads a small stream of its own, to which `subscribe` adds an entry. So Redis sees
two connections from a gateway process, whether it has one client or a thousand.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable

import redis

from gateway_app.streaming.feed import Feed, Subscription, Watching
from tasks.logs import get_logger
from tasks.queueing.together import Together
from tasks.redis_line import Line
from tasks.stream import FIELD, Cursor, stream_key

logger = get_logger(__name__)

#: A stream entry as redis-py returns it to a client that does not decode.
RawEntry = tuple[bytes, dict[bytes, bytes]]
#: One as Redis answers with it: fields and values in turn.
_Answered = tuple[bytes, list[bytes]]
#: How long one read waits for news. The reading client's socket must be allowed to wait longer.
BLOCK_S = 5.0
_RETRY_S = 0.5
#: What one read returns at most, in entries: of each stream, and of all together, or as many as there are streams.
_ENTRIES_EACH = 256
_ENTRIES = 4096
_CONTROL_TTL_S = 3600


class Relay:
    """The reader. `client` is used by its thread alone; `waker` is shared."""

    def __init__(self, client: redis.Redis, waker: Together, prefix: str, buffer_frames: int) -> None:
        self._line = Line(client)
        self._waker = waker
        self._prefix = prefix
        self.limit = buffer_frames
        self._control = f"{prefix}relay:{uuid.uuid4().hex}"
        self._lock = threading.Lock()
        self._watched: defaultdict[str, set[Watching]] = defaultdict(set)
        self._thread: threading.Thread | None = None
        self._woken = False
        #: When the small stream's own end has to be put off again.
        self._expires_at = 0.0
        self._closing = False

    def subscribe(self, request_id: str, cursor: Cursor, feed: Feed | None = None) -> Subscription:
        """Return a subscription to the request's stream, after `cursor`. Close it when done.

        With a `feed`, its entries go there as soon as it is attached; without, ask it for the next.
        """
        return Subscription(self, stream_key(self._prefix, request_id), cursor, feed or Feed(self, self.limit))

    def attach(self, subscriptions: Iterable[Watching]) -> None:
        """Have the reader feed `subscriptions`, each from where its client is."""
        with self._lock:
            for subscription in subscriptions:
                subscription.read_to = subscription.delivered
                self._watched[subscription.key].add(subscription)
            # Until the reader looks at what is watched, one wake does for all.
            waking, self._woken = not self._woken, True
            if self._thread is None or not self._thread.is_alive():
                # Started with the first client: a server that forks its workers must not have forked this thread.
                self._thread = threading.Thread(target=self._read_forever, name="stream-relay", daemon=True)
                self._thread.start()
        if waking:
            self._wake()

    def detach(self, subscription: Watching) -> None:
        """Stop feeding `subscription`."""
        with self._lock:
            self._drop(subscription)

    def close(self) -> None:
        """End the reader."""
        self._closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()

    def _drop(self, subscription: Watching) -> None:
        watchers = self._watched.get(subscription.key)
        if watchers is not None:
            watchers.discard(subscription)
            if not watchers:
                del self._watched[subscription.key]

    def _wake(self) -> None:
        try:
            self._waker.execute_command("XADD", self._control, "MAXLEN", 1, "*", "w", "")
            if time.monotonic() >= self._expires_at:
                self._waker.execute_command("EXPIRE", self._control, _CONTROL_TTL_S)
                self._expires_at = time.monotonic() + _CONTROL_TTL_S / 2
        except redis.RedisError:
            # The reader meets the same fault and reads the new set when it comes back.
            self._woken = False
            logger.warning("the stream relay could not be woken, and looks again in time", seconds=BLOCK_S)

    def _read_forever(self) -> None:
        position = "0-0"
        failing = False
        while not self._closing:
            with self._lock:
                self._woken = False
                wanted = {
                    key: min(subscription.read_to for subscription in watchers)
                    for key, watchers in self._watched.items()
                }
            count = max(1, min(_ENTRIES_EACH, _ENTRIES // (1 + len(wanted))))
            streams = (self._control, *wanted, position, *map(str, wanted.values()))
            try:
                answer = self._read("COUNT", count, "BLOCK", int(BLOCK_S * 1000), "STREAMS", *streams)
            except redis.RedisError as error:
                if not failing:
                    logger.warning("the stream relay lost Redis", error=type(error).__name__)
                failing = True
                time.sleep(_RETRY_S)
                continue
            if failing:
                logger.info("the stream relay reached Redis again")
                failing = False
            for raw_key, entries in answer:
                key = raw_key.decode()
                if key == self._control:
                    position = entries[-1][0].decode()
                else:
                    self._deliver(key, wanted[key], entries)

    def _read(self, *arguments: str | int) -> Collection[tuple[bytes, list[_Answered]]]:
        """Return the streams that have entries, with those, once one has or it has blocked for as long as it may."""
        [answer] = self._line.ask([("XREAD", *arguments)])
        if isinstance(answer, redis.RedisError):
            raise answer
        # A map in newer versions of the protocol, pairs in older ones, nothing if there is none.
        return answer.items() if isinstance(answer, dict) else answer or ()

    def _deliver(self, key: str, after: Cursor, entries: list[_Answered]) -> None:
        """Hand over the entries that follow `after`."""
        with self._lock:
            for subscription in tuple(self._watched.get(key, ())):
                if subscription.read_to < after:
                    # It came while these were being read, and lacks what lies before them: the next read is for it too.
                    continue
                for raw_id, fields in entries:
                    if not subscription.offer((Cursor.parse(raw_id.decode()), fields[fields.index(FIELD) + 1])):
                        self._drop(subscription)
                        break
