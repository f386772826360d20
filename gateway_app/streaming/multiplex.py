"""Many tasks watched by one thread, through one feed.

A running task's frames come from the feed. A finished one's are replayed, one task after the other, so that no more
than one task's frames are held at a time. A running task that is silent for a heartbeat is looked up in the database,
as its worker may have been lost after the commit, or Redis some of its frames; if it has ended, the rest is a replay
like any other. So a watch is always in one of two places, `_running` or `_finished`, and moves from the one to the
other at most once.

None of this is shared between threads, except the feed, which the relay fills.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlalchemy.engine import Row

from gateway_app.streaming.feed import Entry, Feed, Subscription
from gateway_app.streaming.watch import Watcher
from tasks.crypto import DecryptionFailed
from tasks.errors import DatabaseUnavailable, GatewayError, NotFound, StreamUnavailable
from tasks.logs import get_logger
from tasks.schema import TERMINAL_STATES
from tasks.stream import Cursor, Frame

logger = get_logger(__name__)

#: What a client may lag behind the relay, in frames over all its tasks, before Redis is read again for it.
HELD_FRAMES = 1024
#: Silent tasks looked up in a row, so that the frames of the others are not held up.
_LOOKUPS = 8

#: What came of a watched task: its next frame; or None, at the end of a watch that showed no terminal frame; or the error
#: that ended the watch.
Outcome = Frame | GatewayError | None
Step = tuple[str, Outcome]


@dataclass(slots=True)
class _Running:
    subscription: Subscription
    data_key: bytes
    cursor: Cursor
    heard: float = field(default_factory=time.monotonic)


class Watches:
    """What one client watches. `wake` is called from another thread when `take` may have something."""

    def __init__(self, watcher: Watcher, organization: str, wake: Callable[[], None]) -> None:
        self._watcher = watcher
        self._organization = organization
        self._feed = Feed(watcher.relay, HELD_FRAMES, wake)
        #: By task id; the one that was silent for longest comes first.
        self._running: OrderedDict[str, _Running] = OrderedDict()
        self._ids: dict[Subscription, str] = {}
        self._finished: OrderedDict[str, Cursor] = OrderedDict()
        self._replay: tuple[str, Iterator[Step]] | None = None
        self._replay_next = False

    def __len__(self) -> int:
        return len(self._running) + len(self._finished)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._running or request_id in self._finished

    @property
    def idle(self) -> bool:
        """Tell whether `take` has nothing until the next wake."""
        return not self._feed.held and not self._finished

    def add(self, row: Row[Any], cursor: Cursor) -> None:
        """Watch a request from `cursor` on; of one that is being watched, go on from there instead.

        Raises InvalidCursor if it is known already that the stream has not come as far.
        """
        if row.state in TERMINAL_STATES:
            self.drop(row.request_id)
            self._finished[row.request_id] = cursor
            return
        # Asked for the check alone: it subscribes only once it is iterated over.
        self._watcher.frames(row, cursor)
        self.drop(row.request_id)
        data_key = self._watcher.keys.unwrap(row.data_key, row.request_id)
        subscription = self._watcher.relay.subscribe(row.request_id, cursor, self._feed)
        self._running[row.request_id] = _Running(subscription, data_key, cursor)
        self._ids[subscription] = row.request_id
        subscription.attach()

    def drop(self, request_id: str) -> bool:
        """Stop watching a request. Returns False if it was not being watched."""
        running = self._running.pop(request_id, None)
        if running is not None:
            del self._ids[running.subscription]
            running.subscription.close()
        replaying = self._finished.pop(request_id, None)
        if self._replay is not None and self._replay[0] == request_id:
            self._replay = None
        return running is not None or replaying is not None

    def close(self) -> None:
        """Stop watching everything."""
        for request_id in (*self._running, *self._finished):
            self.drop(request_id)

    def take(self) -> Step | None:
        """Return what comes next, or None if nothing does for now. Replays and the feed take turns."""
        self._replay_next = not self._replay_next
        sources = (self._from_replay, self._from_feed)
        for source in sources if self._replay_next else reversed(sources):
            step = source()
            if step is not None:
                return step
        return None

    def look_up(self) -> bool:
        """Find some of the tasks that have ended without a word. Returns True if others are still to be looked up."""
        before = time.monotonic() - self._watcher.heartbeat_s
        for request_id, running in list(islice(self._running.items(), _LOOKUPS)):
            if running.heard > before:
                return False
            try:
                ended = self._watcher.find(request_id, self._organization).state in TERMINAL_STATES
            except DatabaseUnavailable:
                # Frames come without it. Asking for each task would wait for the same database every time.
                for other in self._running.values():
                    other.heard = time.monotonic()
                return False
            except NotFound:
                # The replay finds the same, and says so.
                ended = True
            if ended:
                self.drop(request_id)
                self._finished[request_id] = running.cursor
            else:
                running.heard = time.monotonic()
                self._running.move_to_end(request_id)
        return any(running.heard <= before for running in islice(self._running.values(), 1))

    def _from_feed(self) -> Step | None:
        while (taken := self._feed.next(0)) is not None:
            step = self._read(self._ids[taken[0]], taken[1])
            if step is not None:
                return step
        return None

    def _read(self, request_id: str, entry: Entry) -> Step | None:
        running = self._running[request_id]
        try:
            frame = Frame.unseal(running.data_key, request_id, *entry)
        except DecryptionFailed:
            self.drop(request_id)
            return request_id, _unreadable(request_id)
        if not frame.cursor.follows(running.cursor):
            # Redis lost what lies between. It is all in SQL once the request has ended; until then, silence.
            if frame.terminal:
                self.drop(request_id)
                self._finished[request_id] = running.cursor
            return None
        running.cursor, running.heard = frame.cursor, time.monotonic()
        self._running.move_to_end(request_id)
        if frame.terminal:
            self.drop(request_id)
        return request_id, frame

    def _from_replay(self) -> Step | None:
        if self._replay is None:
            if not self._finished:
                return None
            request_id, cursor = next(iter(self._finished.items()))
            self._replay = request_id, self._steps(request_id, cursor)
        request_id, steps = self._replay
        step = next(steps)
        if not isinstance(step[1], Frame) or step[1].terminal:
            self.drop(request_id)
        return step

    def _steps(self, request_id: str, cursor: Cursor) -> Iterator[Step]:
        try:
            row = self._watcher.find(request_id, self._organization)
            if row.state not in TERMINAL_STATES:
                # The stream says that it has. Waiting here for what it says next would hold up all others.
                raise StreamUnavailable
            for frame in self._watcher.frames(row, cursor):
                yield request_id, frame
        except GatewayError as error:
            yield request_id, error
        except DecryptionFailed:
            yield request_id, _unreadable(request_id)
        yield request_id, None


def _unreadable(request_id: str) -> GatewayError:
    """Return the error of a stream that somebody else wrote into. It is not a reason to end the other watches."""
    logger.error("a stream holds what cannot be decrypted", request_id=request_id)
    return GatewayError("the stream of this task cannot be read")
