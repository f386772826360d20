"""A WebSocket that no peer can hold up, blow up or keep open.

simple-websocket makes the handshake; from then on this drives wsproto itself, in the one thread that serves the
socket. simple-websocket's own way would be a second thread a socket, which sends its pings between (and inside) our
frames, cuts large frames short, waits for a reader that has stopped for as long as that takes, keeps any number of
messages, and leaves the thread behind if the peer never answers a close.

Here nothing waits but `wait`: for news from the peer, for room to send, for a `wake` from another thread. What is sent
goes to a buffer. While that is full nothing more is read or produced, and if the peer takes nothing out of it for
`send_timeout_s` the connection is reset: the client comes back with its last cursor. A peer that is silent for
`ping_interval_s` is pinged, and given up after as long again. Messages are text of at most `message_bytes`.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from simple_websocket import Server  # type: ignore[import-untyped]
from wsproto import WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.frame_protocol import CloseReason

#: What a client may leave unread before nothing more is made for it, in bytes, here and in the kernel.
_BUFFER_BYTES = 64 * 2**10
#: No less than a TLS record: what is left of one would not make the socket readable.
_READ_BYTES = 16 * 2**10
#: How long the peer has to take the last bytes and close its side.
_CLOSE_S = 2.0
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_TROUBLE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Gone(Exception):
    """The connection has ended."""


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """What a peer may do."""

    message_bytes: int = 4 * 2**20
    send_timeout_s: float = 10.0
    ping_interval_s: float = 20.0


class Socket:
    """The serving side of one WebSocket. All but `wake` and `stop` belong to one thread."""

    def __init__(self, server: Server, limits: SocketLimits) -> None:
        self._socket: socket.socket = server.sock
        self._protocol: WSConnection = server.ws
        # Ours from here on: flask-sock neither sends on nor closes what is not connected.
        server.connected = False
        self._limits = limits
        self._out = bytearray()
        self._inbox: deque[str] = deque()
        self._message = bytearray()
        self._progress = self._heard = time.monotonic()
        self._farewell: CloseConnection | None = None
        self._pinged = self._stopping = self._over = False
        self._bell, self._ring = socket.socketpair()
        self._rung = False
        for end in (self._socket, self._bell, self._ring):
            end.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        if self._socket.family in (socket.AF_INET, socket.AF_INET6):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)

    @property
    def room(self) -> bool:
        """Tell whether the client keeps up, so that more may be sent."""
        return len(self._out) < _BUFFER_BYTES

    @property
    def pending(self) -> bool:
        """Tell whether a message has come that was not taken yet."""
        return bool(self._inbox)

    def wake(self) -> None:
        """End the present or the next `wait`. Any thread may call this; it never waits."""
        if not self._rung:
            self._rung = True
            with suppress(OSError):
                self._ring.send(b"!")

    def stop(self) -> None:
        """Have the connection closed as by a server that goes away. Any thread may call this."""
        self._stopping = True
        self.wake()

    def send(self, text: str) -> None:
        """Send a message, as soon as the client takes it. Look for `room` first."""
        self._put(TextMessage(data=text))

    def receive(self) -> str | None:
        """Return the next message that has come, or None."""
        return self._inbox.popleft() if self._inbox else None

    def wait(self, timeout_s: float) -> None:
        """Send and receive what can be, until there is something to do or `timeout_s` seconds have passed.

        Raises Gone once the connection has ended, from whichever side.
        """
        if self._stopping:
            self.close(CloseReason.GOING_AWAY, "the server is stopping")
        if self._farewell is not None and not self._inbox:
            self._refuse(self._farewell.code, self._farewell.reason or "")
        full = not self.room
        self._flush()
        if full and self.room:
            # That is what the caller was waiting for.
            timeout_s = 0.0
        reading = self.room and not self._inbox and self._farewell is None
        self._poll.register(self._socket, reading * select.POLLIN | bool(self._out) * select.POLLOUT)
        for descriptor, events in self._poll.poll(1000 * max(0.0, min(timeout_s, self._patience()))):
            if descriptor == self._bell.fileno():
                self._bell.recv(64)
                self._rung = False
            elif events & (select.POLLIN | _TROUBLE):
                self._read()
        self._flush()
        self._be_strict(reading)
        if self._over:
            self.abort()
            raise Gone

    def close(self, code: int = CloseReason.NORMAL_CLOSURE, reason: str = "") -> None:
        """Deliver what was sent, then close. Raises Gone."""
        self._shut(code, reason, self._limits.send_timeout_s)

    def abort(self) -> None:
        """End the connection at once. Nothing happens if it has ended."""
        self._over = True
        with suppress(OSError):
            if self._out:
                # The peer takes nothing: the kernel shall not go on trying for minutes.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Closing it is left to the web server, which would stumble over a socket closed behind its back.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._bell.close()
        self._ring.close()

    def _put(self, event: Event) -> None:
        if self._protocol.state is ConnectionState.OPEN or isinstance(event, CloseConnection):
            if not self._out:
                self._progress = time.monotonic()
            self._out += self._protocol.send(event)

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self._socket.send(self._out[:_BUFFER_BYTES])
                del self._out[:sent]
                self._progress = time.monotonic()
        except _NOT_NOW:
            pass
        except OSError:
            self._out.clear()
            self._over = True

    def _read(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except _NOT_NOW:
            return
        except OSError:
            data = b""
        if not data:
            self._over = True
            return
        self._heard, self._pinged = time.monotonic(), False
        self._protocol.receive_data(data)
        for event in self._protocol.events():
            self._obey(event)

    def _obey(self, event: Event) -> None:
        if isinstance(event, TextMessage):
            self._message += event.data.encode()
            if len(self._message) > self._limits.message_bytes:
                self._refuse(CloseReason.MESSAGE_TOO_BIG, f"at most {self._limits.message_bytes} bytes a message")
            if event.message_finished:
                self._inbox.append(self._message.decode())
                self._message.clear()
        elif isinstance(event, BytesMessage):
            self._refuse(CloseReason.UNSUPPORTED_DATA, "messages are JSON in text frames")
        elif isinstance(event, Ping):
            self._put(event.response())
        elif isinstance(event, CloseConnection):
            # The peer's, or wsproto's for what it could not read. What came before it is still to be done.
            self._farewell = event

    def _patience(self) -> float:
        """Return the seconds until the peer has to be looked at again."""
        now = time.monotonic()
        if self._out:
            return self._progress + self._limits.send_timeout_s - now
        return self._heard + (1 + self._pinged) * self._limits.ping_interval_s - now

    def _be_strict(self, was_reading: bool) -> None:
        """Give up a peer that takes nothing or says nothing."""
        now = time.monotonic()
        if self._out:
            self._over |= now - self._progress >= self._limits.send_timeout_s
        elif not was_reading:
            # It may have spoken, unheard.
            self._heard = now
        elif now - self._heard >= (1 + self._pinged) * self._limits.ping_interval_s:
            self._over |= self._pinged
            self._pinged = True
            self._put(Ping())

    def _refuse(self, code: int, reason: str) -> None:
        """Close without waiting for more than a moment: this peer has gone, or is not to be trusted."""
        self._shut(code, reason, _CLOSE_S)

    def _shut(self, code: int, reason: str, patience_s: float) -> None:
        """Send what is left and a close frame, wait for the peer to close its side, and raise Gone."""
        if self._protocol.state in (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING):
            self._put(CloseConnection(code=code, reason=reason or None))
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        deadline = time.monotonic() + patience_s
        while self._out and (left := deadline - time.monotonic()) > 0:
            poll.poll(1000 * left)
            self._flush()
        self._drain()
        self.abort()
        raise Gone

    def _drain(self) -> None:
        """Read and forget, so that the last frames are not lost to a reset that answers unread bytes."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        deadline = time.monotonic() + _CLOSE_S
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0 and poll.poll(1000 * left):
                with suppress(*_NOT_NOW):
                    if not self._socket.recv(_READ_BYTES):
                        return
