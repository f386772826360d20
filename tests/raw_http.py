"""HTTP by hand, as far as a stream's client goes: every byte that came, read when the test wants to."""

from __future__ import annotations

import json
import re
import socket
import struct
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

PATIENCE_S = 20.0


class RawClient:
    """One connection, and all that came on it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.socket.settimeout(PATIENCE_S)
        self.received = b""

    @classmethod
    def to(cls, url: str) -> RawClient:
        """Connect to a server."""
        parts = urlsplit(url)
        return cls(socket.create_connection((parts.hostname, parts.port)))

    def ask(
        self, method: str, path: str, body: Any = None, version: str = "HTTP/1.1", **headers: str | None
    ) -> RawClient:
        """Send a request with a JSON body; return the client."""
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} {version}", "Host: gateway"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"] if content else []
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items() if value is not None]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + content)
        return self

    def until(self, wanted: bytes) -> None:
        """Read until this has come."""
        while wanted not in self.received:
            assert self.more(), f"the connection ended after {self.received[-300:]!r}"

    def more(self, size: int = 65536) -> bytes:
        """Read something; nothing is the end of the connection."""
        data = self.socket.recv(size)
        self.received += data
        return data

    def to_end(self) -> bytes:
        """Read to the end of the connection, close it, and return the body."""
        with self.socket:
            while self.more():
                pass
        return self.body

    def broken_off(self) -> bool:
        """Read to the end of the connection, close it, and tell whether the body lacks its last chunk."""
        with self.socket, suppress(ConnectionResetError):
            while self.more():
                pass
        return not self.received.endswith(b"0\r\n\r\n")

    def leave(self, how: str = "close") -> None:
        """End the connection: `close`, `reset` or `shutdown`, which closes one half."""
        if how == "shutdown":
            self.socket.shutdown(socket.SHUT_WR)
            return
        if how == "reset":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    @property
    def status(self) -> int:
        """Return the answer's status."""
        return int(self.received.split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        """Return the answer's headers, of which none may come twice, by lower-case name."""
        lines = self.received.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
        pairs = [line.split(": ", 1) for line in lines]
        headers = {name.lower(): value for name, value in pairs}
        assert len(headers) == len(pairs), f"a header came twice: {lines}"
        return headers

    @property
    def body(self) -> bytes:
        """Return the whole body. Fails unless it came to its end as HTTP says."""
        content = self.received.partition(b"\r\n\r\n")[2]
        return _unchunked(content) if self.headers.get("transfer-encoding") == "chunked" else content


def without_comments(body: bytes) -> bytes:
    """Return an event stream without its comments."""
    return b"".join(block + b"\n\n" for block in body.split(b"\n\n") if block and not block.startswith(b":"))


def _unchunked(content: bytes) -> bytes:
    body: list[bytes] = []
    at = 0
    while True:
        end = content.index(b"\r\n", at)
        assert re.fullmatch(rb"[0-9a-fA-F]+", content[at:end]), f"no chunk begins with {content[at : at + 20]!r}"
        length, begin = int(content[at:end], 16), end + 2
        at = begin + length + 2
        assert content[at - 2 : at] == b"\r\n", "a chunk is longer or shorter than it says"
        if not length:
            assert at == len(content), "something follows the last chunk"
            return b"".join(body)
        body.append(content[begin : begin + length])
