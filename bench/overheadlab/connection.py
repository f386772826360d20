"""Kept-alive connections of whoever asks, one question at a time on each."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

from bench.overheadlab.wire import FIRST_TEXT, Reply

_CLOSED = "closed without an answer"
#: Linux's option, which Python has no name for on other systems.
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


class Connection(asyncio.Protocol):
    """One connection. `first_at` is when the first words of the answer came, on `time.perf_counter`'s clock, or 0."""

    def __init__(self) -> None:
        self.reply = Reply()
        self.first_at = 0.0
        self.transport: Any = None
        self._done: asyncio.Future[float] | None = None

    @property
    def usable(self) -> bool:
        """Tell whether another question can be asked on it."""
        return self.transport is not None and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what is written to."""
        self.transport = transport

    def ask(self, request: bytes) -> asyncio.Future[float]:
        """Send it; the result is when the answer was complete."""
        self.reply, self.first_at = Reply(), 0.0
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        """Add to the answer."""
        if _QUICKACK is not None:
            # A server that leaves Nagle's algorithm on waits for each acknowledgement. Linux forgets the option by itself.
            self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        complete = self.reply.add(data)
        if not self.first_at and FIRST_TEXT.search(self.reply.data):
            self.first_at = time.perf_counter()
        if complete:
            self._end(None)
            if not self.reply.reusable:
                self.transport.close()

    def eof_received(self) -> None:
        """End the answer: whatever came without a stated length is complete now."""
        self._end(None if self.reply.data else ConnectionError(_CLOSED))

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer that was not complete."""
        self._end(exc or ConnectionError(_CLOSED))

    def _end(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(time.perf_counter())
            else:
                self._done.set_exception(error)


class Connections:
    """As many connections to a port of this machine as questions are asked at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []

    async def open(self, number: int) -> None:
        """Have so many before the first question."""
        self._idle = [await self._new() for _ in range(number)]

    async def take(self) -> Connection:
        """Return an idle one, or another one."""
        while self._idle:
            if (connection := self._idle.pop()).usable:
                return connection
        return await self._new()

    def give_back(self, connection: Connection) -> None:
        """Keep one for the next question."""
        self._idle.append(connection)

    async def close(self) -> None:
        """Close all that are idle."""
        for connection in self._idle:
            connection.transport.close()
        await asyncio.sleep(0)

    async def _new(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
        return connection
