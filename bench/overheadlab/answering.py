"""The server's side of HTTP/1.1 for stand-ins of a model: whole requests in, bytes out. Chunks are written as they come."""

from __future__ import annotations

import asyncio
import re
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"
_JSON_HEAD = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_END = b"0\r\n\r\n"


class Answering(asyncio.Protocol):
    """One connection of a client. Whoever derives from it writes to `transport` in `answer`, then or later."""

    def __init__(self) -> None:
        self.transport: Any = None
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what is written to."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Have each request answered that is complete."""
        self._received += data
        while (end := self._received.find(_HEAD_END)) >= 0:
            head = bytes(self._received[: end + 2])
            found = _LENGTH.search(head)
            whole = end + len(_HEAD_END) + (int(found[1]) if found else 0)
            if len(self._received) < whole:
                return
            body = bytes(self._received[end + len(_HEAD_END) : whole])
            del self._received[:whole]
            self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        """Answer one request, of which `head` ends with its last line."""
        raise NotImplementedError


def with_length(content: bytes, status: bytes = b"200 OK") -> bytes:
    """Return a whole answer that is JSON."""
    return _JSON_HEAD % (status, len(content)) + content


def event(content: bytes) -> bytes:
    """Return one server-sent event as a chunk."""
    line = b"data: %b\n\n" % content
    return b"%x\r\n%b\r\n" % (len(line), line)
