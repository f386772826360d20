"""Answers while a client waits, whole or streamed.

Where the client of a call is the only one who will see its answer, the request is cancelled when that client goes
away, and the GPU is free again. Whoever only watches never cancels anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from flask import Response, request
from sqlalchemy.engine import Row

from gateway_app.api import sse
from gateway_app.cancelling import Canceller
from gateway_app.streaming import presence
from gateway_app.streaming.pump import Make, Pump
from gateway_app.streaming.watch import Watcher
from tasks.errors import Cancelled, by_code
from tasks.job import Result
from tasks.schema import TERMINAL_STATES
from tasks.stream import START, Cursor, Frame, gathered

#: How often a client's socket is looked at.
LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Synchronous:
    """Waits for answers."""

    watcher: Watcher
    canceller: Canceller
    pump: Pump

    def result(self, row: Row[Any], gone: Callable[[], bool]) -> Result:
        """Return the whole answer. Raises the error that the request ended with; a client that is gone gets one too."""
        said = [frame for frame in self.frames(row, gone) if frame is not None]
        if said and said[-1].event == "completed":
            return gathered(said)
        row = self.watcher.find(row.request_id, row.organization)
        result = self.watcher.result(row)
        if row.state == "completed" and result is not None:
            return result
        # One that has not ended is about to be cancelled, since nobody is there to be answered.
        error = by_code(row.error_code)() if row.state in TERMINAL_STATES else Cancelled()
        error.request_id = row.request_id
        raise error

    def stream(self, row: Row[Any], make: Make) -> Response:
        """Return a response that streams what `make` makes of the request's frames; leaving it cancels the request."""
        if row.state in TERMINAL_STATES:
            return sse.respond(make(self.watcher.frames(row, START)))
        if self.pump.takes(request.environ):
            return self.pump.respond(row, START, make, lambda: self.canceller.abandon(row.request_id, row.organization))
        return sse.respond(make(self.frames(row, presence.watch(request.environ))))

    def watch(self, row: Row[Any], cursor: Cursor, make: Make) -> Response:
        """Return the same from a cursor on, for a client that may come and go.

        What has ended is read from Redis too while it is whole there: a client that takes nothing of it then holds neither
        a thread nor the whole answer.
        """
        takes = self.pump.takes(request.environ)
        if takes and row.state in TERMINAL_STATES and self.watcher.is_kept(row, cursor):
            return self.pump.respond(row, cursor, make)
        frames = self.watcher.frames(row, cursor)
        if takes and not isinstance(frames, list):
            return self.pump.respond(row, cursor, make)
        return sse.respond(make(frames))

    def frames(self, row: Row[Any], gone: Callable[[], bool]) -> Iterator[Frame | None]:
        """Return the request's frames, None for each silence of a heartbeat.

        The request is cancelled when the client is gone, or when the iterator is closed before the last frame.
        """
        frames = self._frames(row, gone)
        # Begun at once: closing a generator that has not begun would cancel nothing.
        next(frames)
        return frames

    def _frames(self, row: Row[Any], gone: Callable[[], bool]) -> Iterator[Frame | None]:
        ended = False
        said_at = looked_at = time.monotonic()
        try:
            yield None
            for frame in self.watcher.frames(row, START, LOOK_S):
                at = time.monotonic()
                if frame is not None:
                    ended = frame.terminal
                # However much there is to say: who waits for the whole answer reads nothing until its end.
                if not ended and (frame is None or at - looked_at >= LOOK_S):
                    looked_at = at
                    if gone():
                        return
                if frame is not None or at - said_at >= self.watcher.heartbeat_s:
                    said_at = at
                    yield frame
            ended = True
        finally:
            if not ended:
                self.canceller.abandon(row.request_id, row.organization)
