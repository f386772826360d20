"""One stream on the pump's loop: entries in, bytes out."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.engine import Row

from gateway_app.access import Answered
from gateway_app.api.sse import HEARTBEAT
from gateway_app.streaming.feed import Entry
from gateway_app.streaming.send_timeout import SendTimeout
from tasks.logs import get_logger
from tasks.stream import Cursor, Frame, stream_key
from tasks.tracing import Span

if TYPE_CHECKING:
    from gateway_app.streaming.pump import Make, Pump

logger = get_logger(__name__)
#: Bytes that may wait for a client before no more are made for it.
BUFFER_BYTES = 64 * 1024
#: What a client may send while it is being answered: nothing of use.
_MAX_IGNORED_BYTES = 64 * 1024


class PumpedStream(asyncio.Protocol):
    """Serves one client. Everything but `offer` runs on the loop."""

    def __init__(
        self,
        pump: Pump,
        row: Row[Any],
        cursor: Cursor,
        make: Make,
        *,
        head: bytes,
        chunked: bool,
        method: str,
        route: str | None,
        abandon: Callable[[], None] | None,
        span: Span,
    ) -> None:
        watcher = pump.watcher
        self.row = row
        self.cursor = cursor
        self.key = stream_key(watcher.prefix, row.request_id)
        self.read_to = cursor
        self._pump = pump
        self._relay = watcher.relay
        self._limit = watcher.relay.limit
        self._heartbeat_s = watcher.heartbeat_s
        self._data_key = watcher.keys.unwrap(row.data_key, row.request_id)
        self._entries: deque[Entry | Frame] = deque()
        self._body: Iterator[bytes] = iter(make(self._available()))
        self._head, self._chunked, self._abandon = head, chunked, abandon
        self._method, self._route = method, route
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._send_timeout = SendTimeout()
        self._span = span
        self._started_at = time.monotonic()
        self._size = 0
        #: Whether the database is being asked about the request.
        self.looked_for = False
        #: Set when the connection is closed.
        self.closed: asyncio.Future[None] = pump.future()
        self._attached = False
        #: Whether all frames there will be are in `_entries`; whether the last one was taken; whether all was written.
        self._complete = False
        self._ended = False
        self._over = False
        self._spoke = True
        self._ignored = 0

    @property
    def delivered(self) -> Cursor:
        """Return where the client is."""
        return self.cursor

    def attach(self) -> None:
        """Have the relay feed it. This may wait for Redis, so it is not for the loop."""
        self._attached = True
        self._relay.attach([self])
        if self._over:
            # It ended meanwhile, and may have been detached before it was attached.
            self._relay.detach(self)

    # --- What the relay calls, on its own thread --------------------------------------------------

    def offer(self, entry: Entry) -> bool:
        """Take an entry. Returns False if the client is too slow, and must be dropped from the reader for now."""
        if entry[0] <= self.read_to:
            return True
        if len(self._entries) >= self._limit:
            self._attached = False
            # The loop may just have taken the last entry, and would not know that no more will come.
            self._pump.wake(self)
            return False
        self.read_to = entry[0]
        self._entries.append(entry)
        self._pump.wake(self)
        return True

    # --- What asyncio calls -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: the head, whatever comes before the first frame, then the relay."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._transport.write(self._head)
        self.write_available()
        self._beat()

    def data_received(self, data: bytes) -> None:
        """Ignore what a client says while it is answered, if it is not too much."""
        self._ignored += len(data)
        if self._ignored > _MAX_IGNORED_BYTES:
            self.abort()

    def eof_received(self) -> None:
        """Take a client that says no more for one that left, unless it has been given everything."""
        if not self._over:
            self.abort()

    def pause_writing(self) -> None:
        """Make no more for a client that does not take what it has."""
        if self._transport is not None:
            self._send_timeout.expect_progress(self._transport)

    def resume_writing(self) -> None:
        """Go on."""
        if self._send_timeout.is_set and not self._over:
            self._send_timeout.cancel()
            self.write_available()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  why makes no difference
        """Clean up; a request that only this client waited for is abandoned."""
        how = "ended" if self._over else "broken_off"
        self._over = True
        self._relay.detach(self)
        self._pump.streams.discard(self)
        self._send_timeout.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if not self._ended and self._abandon is not None:
            self._pump.later(self._abandon)
        # As the server's own lines are, which does not see this one's end.
        seconds, request_id = time.monotonic() - self._started_at, self.row.request_id
        trace_id = self._span.trace_id
        self._pump.access.write(
            Answered(self._method, self._route, HTTPStatus.OK, seconds, self._size, request_id, trace_id, how)
        )
        self._span.set({"metaqore.stream.bytes": self._size, "metaqore.stream.broken_off": how != "ended"})
        self._span.end()
        self.closed.set_result(None)

    # --- What the pump calls ----------------------------------------------------------------------

    def write_available(self) -> None:
        """Write what can be made of the frames that have come, unless the client is behind."""
        if self._over or self._transport is None or self._transport.is_closing() or self._send_timeout.is_set:
            return
        chunks: list[bytes] = []
        size = 0
        while size < BUFFER_BYTES:
            try:
                chunk = next(self._body)
            except StopIteration:
                self._write(chunks)
                self._finish()
                return
            except Exception as error:  # whatever it is must not end the loop, and its text may quote the answer
                logger.error("unexpected error in a stream", request_id=self.row.request_id, error=type(error).__name__)
                self.abort()
                return
            if chunk is HEARTBEAT:
                if not self._entries:
                    break
                continue
            chunks.append(chunk)
            size += len(chunk)
        self._write(chunks)
        if size >= BUFFER_BYTES:
            self._pump.wake(self)
        elif not self._attached:
            self._attached = True
            self._pump.attach(self.attach)

    def end_with(self, frames: Iterable[Frame]) -> None:
        """Take the frames that a request ended with, as the database has them."""
        if not self._over:
            self._relay.detach(self)
            self._entries.clear()
            self._entries.extend(frame for frame in frames if frame.cursor > self.cursor)
            self._complete = True
            self.write_available()

    def abort(self) -> None:
        """Cut the client off."""
        if self._transport is not None:
            self._transport.abort()

    # ----------------------------------------------------------------------------------------------

    def _available(self) -> Iterator[Frame | None]:
        while True:
            if not self._entries:
                if self._complete:
                    return
                yield None
                continue
            item = self._entries.popleft()
            frame = item if isinstance(item, Frame) else Frame.unseal(self._data_key, self.row.request_id, *item)
            if not isinstance(item, Frame) and not frame.cursor.follows(self.cursor):
                # Redis lost what lies between. It is all in SQL once the request has ended.
                if frame.terminal:
                    self._pump.look(self)
                continue
            self.cursor = frame.cursor
            self._ended = frame.terminal
            if frame.cursor.sequence == 1:
                self._span.event("first text")
            elif frame.terminal:
                self._span.set({"metaqore.outcome": frame.event})
            yield frame
            if frame.terminal:
                return

    def _write(self, chunks: list[bytes]) -> None:
        data = b"".join(chunks)
        if data and self._transport is not None:
            self._spoke = True
            self._size += len(data)
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def _finish(self) -> None:
        """Say that this is all. The client closes: had it said something, closing first could cost it our last words."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            if self._chunked:
                self._transport.write(b"0\r\n\r\n")
            with suppress(OSError):
                self._transport.write_eof()
            self._send_timeout.expect_progress(self._transport)

    def _beat(self) -> None:
        if self._over:
            return
        if not self._spoke and not self._send_timeout.is_set:
            self._write([HEARTBEAT])
            # Silence: perhaps the request ended without a word, its worker lost after the commit.
            self._pump.look(self)
        self._spoke = False
        self._timer = asyncio.get_running_loop().call_later(self._heartbeat_s, self._beat)
