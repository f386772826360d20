"""Serving one socket, and knowing all that are open.

The loop has three sources, and takes of each in turn: what the client says, what its tasks bring, and the clock. While
the client does not take what it was sent, nothing more is asked of any source, so it costs memory that is bounded, and
no one else's time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from simple_websocket import Server  # type: ignore[import-untyped]

from gateway_app.streaming.multiplex import Outcome, Watches
from gateway_app.streaming.socket import Socket, SocketLimits
from tasks.errors import ServiceUnavailable


class Side(Protocol):
    """The server's side of a conversation."""

    def obey(self, text: str) -> None:
        """Do what a message says."""

    def show(self, request_id: str, outcome: Outcome) -> None:
        """Send what came of a watched task."""


def serve(socket: Socket, watches: Watches, side: Side, every_tick: Callable[[], None], tick_s: float) -> None:
    """Serve a socket to its end, which is Gone. Every `tick_s` seconds, silent tasks are looked up."""
    next_tick = time.monotonic() + tick_s
    while True:
        busy = socket.room and (socket.pending or not watches.idle)
        socket.wait(0 if busy else next_tick - time.monotonic())
        if socket.room and (text := socket.receive()) is not None:
            side.obey(text)
        while socket.room and (step := watches.take()) is not None:
            side.show(*step)
        if time.monotonic() >= next_tick:
            every_tick()
            # More of them wait for no tick, but for what the others have to say.
            next_tick = time.monotonic() + (0 if watches.look_up() else tick_s)


class OpenSockets:
    """The sockets of this process: there are at most `limit`, and `close` ends them all."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: set[Socket] = set()
        self._stopping = False

    @property
    def count(self) -> int:
        """Return how many are open."""
        return len(self._open)

    def check(self) -> None:
        """Raise ServiceUnavailable if no more may be opened. Handshakes of one moment may all pass."""
        if self._stopping or self.count >= self._limit:
            raise ServiceUnavailable("no more sockets can be opened here right now")

    @contextmanager
    def opened(self, server: Server, limits: SocketLimits) -> Iterator[Socket]:
        """Give a socket over the connection of `server`, and see that it ends."""
        socket = Socket(server, limits)
        with self._lock:
            self._open.add(socket)
            if self._stopping:
                socket.stop()
        try:
            yield socket
        finally:
            with self._lock:
                self._open.discard(socket)
            socket.abort()

    def close(self) -> None:
        """Have every socket closed with 1001, and no more opened. Does not wait for them."""
        with self._lock:
            self._stopping = True
            for socket in self._open:
                socket.stop()
