"""A WebSocket client that can also misbehave: it sends whatever bytes it is told to, and reads only when asked."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import CloseConnection, Event, Ping, Pong, TextMessage

TIMEOUT_S = 20.0
#: The example of RFC 6455.
HANDSHAKE = {
    "Host": "127.0.0.1",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


class Refused(Exception):
    """The server answered with HTTP."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(status, body)
        self.status, self.headers, self.body = status, headers, body

    @property
    def problem(self) -> dict[str, Any]:
        """Return the problem document."""
        content: dict[str, Any] = json.loads(self.body)
        return content


class Closed(Exception):
    """The server closed the connection. `code` is None if it did without a close frame."""

    def __init__(self, code: int | None, reason: str | None = None) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class WebSocketClient:
    """A client at `path`, connected. Headers replace those of the handshake; None takes one away. Raises Refused."""

    def __init__(
        self,
        port: int,
        path: str,
        headers: Mapping[str, str | None] | None = None,
        *,
        method: str = "GET",
        receive_buffer: int | None = None,
        answers_pings: bool = True,
    ) -> None:
        self.answers_pings = answers_pings
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(TIMEOUT_S)
        self._events: list[Event] = []
        self._closed: Closed | None = None
        given = {**HANDSHAKE, "Host": f"127.0.0.1:{port}", **(headers or {})}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value)]
        try:
            self.socket.connect(("127.0.0.1", port))
            self.socket.sendall("\r\n".join([*lines, "", ""]).encode())
            self.status, self.headers, rest = self._answer()
            if self.status != 101:
                raise Refused(self.status, self.headers, self._body(rest))
        except BaseException:
            self.socket.close()
            raise
        self.protocol = Connection(ConnectionType.CLIENT, trailing_data=rest)
        self._events += self.protocol.events()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, content: object) -> None:
        """Send a message: text as it is, all else as JSON."""
        text = content if isinstance(content, str) else json.dumps(content)
        self.socket.sendall(frame(0x1, text.encode()))

    def receive(self, timeout_s: float = TIMEOUT_S) -> Any:
        """Return the next message's JSON. Raises Closed, or TimeoutError."""
        return json.loads(self.text(timeout_s))

    def text(self, timeout_s: float = TIMEOUT_S) -> str:
        """Return the next message. Raises Closed, or TimeoutError."""
        text = ""
        deadline = time.monotonic() + timeout_s
        while True:
            event = self.event(max(0.001, deadline - time.monotonic()))
            if isinstance(event, TextMessage):
                text += event.data
                if event.message_finished:
                    return text

    def rest(self) -> list[Any]:
        """Return all messages up to a close with 1000."""
        messages: list[Any] = []
        try:
            while True:
                messages.append(self.receive())
        except Closed as closed:
            assert closed.code == 1000, closed
        return messages

    def closed(self, timeout_s: float = TIMEOUT_S) -> Closed:
        """Return how the server closed, and forget what it said before."""
        deadline = time.monotonic() + timeout_s
        try:
            while True:
                self.event(max(0.001, deadline - time.monotonic()))
        except Closed as closed:
            return closed

    def event(self, timeout_s: float = TIMEOUT_S) -> Event:
        """Return the next of wsproto's events. Raises Closed, or TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while not self._events:
            if self._closed is not None:
                raise self._closed
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.socket.recv(2**16)
            except ConnectionError:
                self._closed = Closed(None, "reset")
                continue
            finally:
                self.socket.settimeout(TIMEOUT_S)
            if not data:
                self._closed = Closed(None)
                continue
            self.protocol.receive_data(data)
            self._events += self.protocol.events()
        event = self._events.pop(0)
        if isinstance(event, CloseConnection):
            self._closed = Closed(event.code, event.reason)
            raise self._closed
        if isinstance(event, Ping) and self.answers_pings:
            with suppress(ConnectionError):
                self.socket.sendall(frame(0xA, bytes(event.payload)))
        return event

    def pong(self) -> bytes:
        """Return the payload of the next pong."""
        while not isinstance(event := self.event(), Pong):
            pass
        return bytes(event.payload)

    def _answer(self) -> tuple[int, dict[str, str], bytes]:
        data = b""
        while b"\r\n\r\n" not in data:
            more = self.socket.recv(2**16)
            if not more:
                raise Closed(None)
            data += more
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split()[1]), headers, rest

    def _body(self, body: bytes) -> bytes:
        wanted = int(self.headers.get("content-length", "0"))
        while len(body) < wanted and (more := self.socket.recv(2**16)):
            body += more
        return body


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, masked: bool = True, length: int | None = None
) -> bytes:
    """Return a frame. `length` is what its header claims, if not the truth."""
    claimed = len(payload) if length is None else length
    mask = 0x80 if masked else 0
    head = bytes([opcode | (0x80 if fin else 0)])
    if claimed < 126:
        head += bytes([mask | claimed])
    elif claimed < 2**16:
        head += struct.pack("!BH", mask | 126, claimed)
    else:
        head += struct.pack("!BQ", mask | 127, claimed)
    if not masked:
        return head + payload
    key = os.urandom(4)
    repeated = int.from_bytes((key * (len(payload) // 4 + 1))[: len(payload)], "big")
    hidden = (int.from_bytes(payload, "big") ^ repeated).to_bytes(len(payload), "big")
    return head + key + hidden
