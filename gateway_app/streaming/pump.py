"""Streams without threads: one loop a process writes to all clients that watch.

A view that answers with a stream gives its socket away: the response is started here, the server's thread is free
again, and from then on the relay's entries are turned into bytes and written by one asyncio loop. A thousand threads
that each wake for every token would spend their time waiting for Python's lock.

What a stream says is made by the same generator as elsewhere: it is given frames, and None when there are none, for
which it yields HEARTBEAT; here that is the sign to wait for more. Where the server has no plain socket to give (Flask's
own, TLS ended here), the view falls back to an ordinary response, with a thread of its own.

A client that closes its connection is noticed at once. One that reads too slowly is left to Redis, which keeps the
stream: its frames are read again from its position once it catches up, and if it takes nothing for `STALL_S` it is cut
off. The loop itself never waits for Redis or the database: other threads do that for it.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from flask import Response
from sqlalchemy.engine import Row
from werkzeug.http import http_date

from gateway_app.access import ROUTE, AccessLog
from gateway_app.streaming.pumped import PumpedStream
from gateway_app.streaming.watch import Watcher
from tasks.errors import GatewayError, InvalidCursor
from tasks.logs import get_logger
from tasks.schema import TERMINAL_STATES
from tasks.stream import Cursor, Frame
from tasks.tracing import UNRECORDED

logger = get_logger(__name__)
Make = Callable[[Iterable[Frame | None]], Iterable[bytes]]
_LOOKERS = 4


class Pump:
    """The loop. `enabled` is set by a server whose sockets may be taken, `access` gets a line for each stream's end."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        self.enabled = False
        self.access = AccessLog()
        self.streams: set[PumpedStream] = set()
        self._ready: deque[PumpedStream] = deque()
        self._scheduled = False
        self._closing = False
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lookers = ThreadPoolExecutor(_LOOKERS, thread_name_prefix="stream-looker")
        # Of its own, so that streams go on while the database keeps the lookers waiting.
        self._attacher = ThreadPoolExecutor(1, thread_name_prefix="stream-attacher")

    def takes(self, environ: Mapping[str, Any]) -> bool:
        """Tell whether the request's socket can be taken: a plain one that carries this request alone."""
        return (
            self.enabled
            and not self._closing
            and type(environ.get("gunicorn.socket")) is socket.socket
            and environ["SERVER_PROTOCOL"] in ("HTTP/1.0", "HTTP/1.1")
            and environ["REQUEST_METHOD"] != "HEAD"
        )

    def respond(self, row: Row[Any], cursor: Cursor, make: Make, abandon: Callable[[], None] | None = None) -> Response:
        """Return a response that gives its socket to the loop.

        `make` turns the request's frames after `cursor` into what is sent; `abandon` is called if the client leaves
        before the last one.
        """
        return Taken(self, row, cursor, make, abandon)

    def add(self, connection: socket.socket, stream: PumpedStream) -> None:
        """Have the loop serve `stream` on `connection`, which is of no more use to others."""
        loop = self._running_loop()

        async def connect(taken: socket.socket) -> None:
            self.streams.add(stream)
            try:
                await loop.connect_accepted_socket(lambda: stream, taken)
            except OSError as error:
                # Its client is gone already; not every system lets such a socket be set up.
                taken.close()
                stream.connection_lost(error)

        with self._starting:
            # So that whatever is added comes to the loop before its end does.
            self._refuse_if_closing()
            asyncio.run_coroutine_threadsafe(connect(socket.socket(fileno=connection.detach())), loop)

    def wake(self, stream: PumpedStream) -> None:
        """Note, from the relay's thread, that `stream` has entries."""
        self._ready.append(stream)
        if not self._scheduled:
            self._scheduled = True
            self._running_loop().call_soon_threadsafe(self._write_ready)

    def look(self, stream: PumpedStream) -> None:
        """Ask the database whether the request ended without a word, and tell the stream."""
        if not stream.looked_for:
            stream.looked_for = True
            self.later(lambda: self._look(stream))

    def later(self, work: Callable[[], None]) -> None:
        """Do what may wait for the database in another thread."""
        self._lookers.submit(_logged, work)

    def attach(self, work: Callable[[], None]) -> None:
        """Do what may wait for Redis in another thread."""
        self._attacher.submit(_logged, work)

    def future(self) -> asyncio.Future[None]:
        """Return a future of the loop."""
        return self._running_loop().create_future()

    def close(self, grace_s: float = 0.0) -> None:
        """Give the streams up to `grace_s` seconds to end, then end them and the loop. No more are taken."""
        with self._starting:
            self._closing = True
        loop = self._loop
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._end(grace_s), loop).result()
        self._attacher.shutdown()
        self._lookers.shutdown()
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()
            self._loop = None

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            with self._starting:
                self._refuse_if_closing()
                if self._loop is None:
                    # Started with the first stream: a server that forks its workers must not have forked this thread.
                    loop = asyncio.new_event_loop()
                    self._thread = threading.Thread(target=loop.run_forever, name="stream-pump", daemon=True)
                    self._thread.start()
                    self._loop = loop
        return self._loop

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise RuntimeError("the pump is closed")

    def _write_ready(self) -> None:
        self._scheduled = False
        for _ in range(len(self._ready)):
            self._ready.popleft().write_available()

    def _look(self, stream: PumpedStream) -> None:
        try:
            row = self.watcher.find(stream.row.request_id, stream.row.organization)
            if row.state not in TERMINAL_STATES:
                return
            frames = list(self.watcher.frames(row, stream.cursor))
        except InvalidCursor:
            # Its client came with a cursor that the request never reached.
            frames = []
        except GatewayError as error:
            logger.warning("a request could not be looked up", request_id=stream.row.request_id, code=error.code)
            return
        finally:
            stream.looked_for = False
        self._running_loop().call_soon_threadsafe(stream.end_with, [frame for frame in frames if frame is not None])

    async def _end(self, grace_s: float) -> None:
        if self.streams:
            await asyncio.wait([stream.closed for stream in self.streams], timeout=grace_s)
        while self.streams:
            # One that is still being set up can be ended a moment later.
            for stream in tuple(self.streams):
                stream.abort()
            await asyncio.wait([stream.closed for stream in self.streams], timeout=0.05)


def _logged(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # nobody looks at what comes of it, and its text may quote an answer
        logger.error("unexpected error beside the streams", error=type(error).__name__)


class Taken(Response):
    """Starts the response on its own, gives the socket away, and tells the server that nothing is left to do.

    `span` is ended with the stream.
    """

    span = UNRECORDED

    def __init__(
        self, pump: Pump, row: Row[Any], cursor: Cursor, make: Make, abandon: Callable[[], None] | None
    ) -> None:
        super().__init__(content_type="text/event-stream; charset=utf-8")
        self._pump = pump
        self._stream = (row, cursor, make, abandon)

    def __call__(self, environ: Mapping[str, Any], _start_response: Any) -> NoReturn:
        """Answer. Always raises StopIteration, which gunicorn knows as "this connection is no longer yours"."""
        row, cursor, make, abandon = self._stream
        chunked = environ.get("SERVER_PROTOCOL") == "HTTP/1.1"
        headers = [(name, value) for name, value in self.headers if name != "Content-Length"]
        headers += [("Cache-Control", "no-cache, no-transform"), ("X-Accel-Buffering", "no"), ("Connection", "close")]
        headers += [("Date", http_date()), *([("Transfer-Encoding", "chunked")] if chunked else [])]
        lines = [f"HTTP/1.1 {self.status}", *(f"{name}: {value}" for name, value in headers), "", ""]
        stream = PumpedStream(
            self._pump,
            row,
            cursor,
            make,
            head="\r\n".join(lines).encode("latin-1"),
            chunked=chunked,
            method=environ["REQUEST_METHOD"],
            route=environ.get(ROUTE),
            abandon=abandon,
            span=self.span,
        )
        # Here, where waiting for Redis holds up nobody else.
        stream.attach()
        try:
            self._pump.add(environ["gunicorn.socket"], stream)
        except RuntimeError:
            self._pump.watcher.relay.detach(stream)
            raise
        raise StopIteration
