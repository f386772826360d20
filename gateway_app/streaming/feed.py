"""What one client takes from the relay's reader.

A client has a feed, which holds a bounded number of entries: of the one stream it watches, or of all of them, so that a
single thread can wait for a thousand streams. What no longer fits is dropped from the reader, and taken up again at its
own position once the client has caught up: Redis keeps the stream, so nothing need be held for it here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tasks.stream import Cursor

if TYPE_CHECKING:
    from gateway_app.streaming.relay import Relay

Entry = tuple[Cursor, bytes]


class Watching(Protocol):
    """What the reader feeds: `key` is a stream's, `read_to` the last entry taken of it, `delivered` the client's place."""

    key: str
    read_to: Cursor

    @property
    def delivered(self) -> Cursor:
        """Return where the client is."""
        ...

    def offer(self, entry: Entry) -> bool:
        """Take an entry from the reader. Returns False if the client is too slow and must be dropped for now."""
        ...


class Feed:
    """Where the reader puts entries for one client, from one stream or from many.

    `limit` is how many entries it holds at most, over all its streams. `wake` is called from the reader's thread when
    something was put in: it must neither wait nor raise.
    """

    def __init__(self, relay: Relay, limit: int, wake: Callable[[], None] | None = None) -> None:
        self._relay = relay
        self._limit = limit
        self._wake = wake
        self._entries: queue.SimpleQueue[tuple[Subscription, Entry]] = queue.SimpleQueue()
        #: Those that the reader has dropped. The lock makes one step of finding the feed full, or empty, and of acting
        #: on it, so that none is forgotten here.
        self._dropped: set[Subscription] = set()
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Return how many entries wait for the client."""
        return self._entries.qsize()

    def next(self, timeout_s: float) -> tuple[Subscription, Entry] | None:
        """Return the next entry and whose it is, or None if none came within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._take_up_again()
            try:
                subscription, entry = self._entries.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if not subscription.closed:
                subscription.delivered = entry[0]
                return subscription, entry

    def offer(self, subscription: Subscription, entry: Entry) -> bool:
        """Take an entry from the reader. Returns False if the client is too slow for it, and it was not taken."""
        with self._lock:
            if self._entries.qsize() >= self._limit:
                self._dropped.add(subscription)
                return False
            self._entries.put((subscription, entry))
        if self._wake is not None:
            self._wake()
        return True

    def _take_up_again(self) -> None:
        """Have the reader feed those that it dropped, once the client has taken all that it was given before."""
        with self._lock:
            if not self._dropped or not self._entries.empty():
                return
            dropped, self._dropped = self._dropped, set()
        self._relay.attach([subscription for subscription in dropped if not subscription.closed])


class Subscription:
    """One client's view of one stream, from its cursor on."""

    def __init__(self, relay: Relay, key: str, cursor: Cursor, feed: Feed) -> None:
        self.key = key
        self.read_to = cursor
        self.delivered = cursor
        self.closed = False
        self._relay = relay
        self._feed = feed
        self._begun = False

    @property
    def held(self) -> int:
        """Return how many entries wait for the client."""
        return self._feed.held

    def next(self, timeout_s: float) -> Entry | None:
        """Return the next entry, or None if none came within `timeout_s` seconds. Not for a shared feed."""
        if not self._begun:
            self.attach()
        taken = self._feed.next(timeout_s)
        return None if taken is None else taken[1]

    def attach(self) -> None:
        """Have the reader feed this subscription."""
        self._begun = True
        self._relay.attach([self])

    def offer(self, entry: Entry) -> bool:
        """Take an entry from the reader. Returns False if the client is too slow and must be dropped for now."""
        if entry[0] <= self.read_to:
            return True
        if not self._feed.offer(self, entry):
            return False
        self.read_to = entry[0]
        return True

    def close(self) -> None:
        """Stop watching."""
        self.closed = True
        self._relay.detach(self)
