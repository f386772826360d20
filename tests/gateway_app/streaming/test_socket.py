"""The hardened socket, served by werkzeug, against clients that behave and clients that do not."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask_sock import Sock  # type: ignore[import-untyped]
from werkzeug.serving import make_server
from wsproto.events import Ping

from gateway_app.api.handshake import Unstarted
from gateway_app.streaming.socket import Gone, Socket, SocketLimits
from tests.services import wait_until
from tests.websocket_client import Closed, WebSocketClient, frame

MESSAGE_BYTES = 2**20
LIMITS = SocketLimits(message_bytes=MESSAGE_BYTES, send_timeout_s=1.0, ping_interval_s=5.0)
TEXT, BINARY, CLOSE, PING, CONTINUATION = 0x1, 0x2, 0x8, 0x9, 0x0


class Served:
    """A server of one path. `behave` is what it does with each socket; at first it echoes."""

    def __init__(self) -> None:
        self.limits = LIMITS
        self.behave: Callable[[Socket], None] = echo
        self.sockets: list[Socket] = []
        self.ended = 0
        app = Flask("served")
        app.config["SOCK_SERVER_OPTIONS"] = {"thread_class": Unstarted}
        Sock(app).route("/")(self._serve)
        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def connect(self, **options: Any) -> WebSocketClient:
        """Return a new client, whose socket on this side is now the last of `sockets`."""
        count = len(self.sockets)
        client = WebSocketClient(self._server.port, "/", **options)
        wait_until(lambda: len(self.sockets) > count, 10, "the socket")
        return client

    def until_ended(self) -> None:
        """Wait until every socket has come to its end."""
        wait_until(lambda: self.ended == len(self.sockets), 10, "the end of every socket")

    def close(self) -> None:
        """Stop everything; every socket must come to its end."""
        for served in self.sockets:
            served.stop()
        self.until_ended()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, server: Any) -> None:
        served = Socket(server, self.limits)
        self.sockets.append(served)
        try:
            with suppress(Gone):
                self.behave(served)
        finally:
            served.abort()
            self.ended += 1


def echo(served: Socket) -> None:
    """Send every message back."""
    while True:
        served.wait(0 if served.pending and served.room else 10)
        if served.room and (text := served.receive()) is not None:
            served.send(text)


def pour(served: Socket) -> None:
    """Send without end, as far as there is room."""
    while True:
        served.wait(0 if served.room else 10)
        while served.room:
            served.send("x" * 1000)


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    """Return the server, which serves all tests one after the other, and survives them."""
    served = Served()
    yield served
    served.close()


@pytest.fixture
def served(running: Served) -> Iterator[Served]:
    """Return the server, as new. After the test it still echoes, whatever was done to it."""
    yield running
    running.limits, running.behave = LIMITS, echo
    with running.connect() as client:
        client.send("still there?")
        assert client.text() == "still there?"
    running.until_ended()


@pytest.mark.parametrize("length", [0, 1, 125, 126, 65535, 65536, MESSAGE_BYTES])
def test_messages_of_any_size_come_whole(served: Served, length: int) -> None:
    """At both sizes of length header, and larger than any buffer on the way, to a client that reads slowly."""
    text = "".join(random.choices("abcdefgh", k=length))
    with served.connect(receive_buffer=4096) as client:
        client.send(text)
        time.sleep(0.05)
        assert client.text() == text


def test_fragments_make_a_message(served: Served) -> None:
    """Cut inside of a character, with a ping between them."""
    text = "thrée 🙂".encode()
    with served.connect() as client:
        for index in range(len(text)):
            client.socket.sendall(frame(CONTINUATION if index else TEXT, text[index : index + 1], fin=False))
            client.socket.sendall(frame(PING, bytes([index])))
            assert client.pong() == bytes([index])
        client.socket.sendall(frame(CONTINUATION))
        assert client.text() == "thrée 🙂"


@pytest.mark.parametrize(
    ("code", "sent"),
    [
        (1003, frame(BINARY, b"{}")),
        (1003, frame(BINARY, b"{}") + frame(TEXT, b"x" * 2 * MESSAGE_BYTES)),
        (1009, frame(TEXT, b"x" * (MESSAGE_BYTES + 1))),
        (1009, frame(TEXT, b"x" * MESSAGE_BYTES, fin=False) + frame(CONTINUATION, b"x", fin=False)),
        (1009, frame(TEXT, "é".encode() * (MESSAGE_BYTES // 2) + b"x")),
        (1009, frame(TEXT, b"x" * (MESSAGE_BYTES + 1), length=2**62)),
        (1007, frame(TEXT, b"\xff\xff")),
        (1007, frame(TEXT, b"\xed\xa0\x80")),
        (1002, frame(TEXT, b"{}", masked=False)),
        (1002, frame(TEXT | 0x40, b"{}")),
        (1002, frame(0x3, b"")),
        (1002, frame(0xF, b"")),
        (1002, frame(PING, b"x" * 126)),
        (1002, frame(PING, b"x", fin=False)),
        (1002, frame(CONTINUATION, b"x")),
        (1002, frame(TEXT, b"x", fin=False) + frame(TEXT, b"x")),
        (1002, frame(TEXT, b"", length=2**63)),
        (1002, frame(CLOSE, b"x")),
        (1002, frame(CLOSE, struct.pack("!H", 1005))),
        (1007, frame(CLOSE, struct.pack("!H", 1000) + b"\xff")),
        (1000, frame(CLOSE, struct.pack("!H", 1000) + b"bye")),
        (4000, frame(CLOSE, struct.pack("!H", 4000))),
        (1005, frame(CLOSE)),
        (None, b""),
    ],
    # The masks are random; two processes must find the same names.
    ids=lambda value: str(value) if isinstance(value, int) else "frames",
)
def test_how_bad_frames_end(served: Served, code: int | None, sent: bytes) -> None:
    """With the code that RFC 6455 has for it. The last client goes away without a word."""
    with served.connect() as client:
        client.socket.sendall(sent)
        if not sent:
            client.socket.shutdown(socket.SHUT_WR)
        assert client.closed(5).code == code


def test_what_came_before_a_close_is_done(served: Served) -> None:
    """A client may say something and go."""
    heard: list[str | None] = []

    def listen(served: Socket) -> None:
        while True:
            served.wait(0 if served.pending else 10)
            heard.append(served.receive())

    served.behave = listen
    with served.connect() as client:
        client.socket.sendall(frame(TEXT, b"one") + frame(TEXT, b"two") + frame(CLOSE, struct.pack("!H", 1000)))
        assert client.closed().code == 1000
    assert [text for text in heard if text is not None] == ["one", "two"]


def test_many_fragments_cost_no_memory(served: Served) -> None:
    """A message of twenty thousand empty pieces, and one of as many single bytes."""
    with served.connect() as client:
        for piece in (b"", b"x"):
            pieces = [frame(TEXT, piece, fin=False), *(frame(CONTINUATION, piece, fin=False) for _ in range(20_000))]
            client.socket.sendall(b"".join([*pieces, frame(CONTINUATION)]))
            assert client.text() == piece.decode() * 20_001


def test_a_flood_of_messages_waits_in_the_network(served: Served) -> None:
    """The client sends more than anyone takes: it is held up, and no more than one reading of it is kept."""
    messages = answers = 0

    def doze(served: Socket) -> None:
        nonlocal messages, answers
        while True:
            served.wait(0.001)
            messages, answers = max(messages, len(served._inbox)), max(answers, len(served._out))

    served.behave = doze
    with served.connect() as client:
        client.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.socket.sendall((frame(TEXT) + frame(PING, b"x")) * 2_000_000)
        wait_until(lambda: messages > 0, 10, "the first message")
    assert messages < 3000
    assert answers < 10_000


def test_pings_are_answered_in_order_and_bounded(served: Served) -> None:
    """A client that pings without end and reads nothing is cut off."""
    with served.connect() as client:
        for number in range(50):
            client.socket.sendall(frame(PING, str(number).encode()))
        assert [client.pong() for _ in range(50)] == [str(number).encode() for number in range(50)]
    with served.connect(receive_buffer=4096) as client, pytest.raises(ConnectionError):
        client.socket.sendall(frame(PING, b"x" * 125) * 200_000)
    assert len(served.sockets[-1]._out) < 100_000


def test_a_stalled_reader_is_cut_off(served: Served) -> None:
    """Within the timeout, while little is held for it, and others are served."""
    served.behave = pour
    before = served.ended
    with served.connect(receive_buffer=4096) as stalled, served.connect() as other:
        began = time.monotonic()
        while served.ended == before:
            assert len(other.text()) == 1000
            assert time.monotonic() - began < 10 * LIMITS.send_timeout_s
        assert time.monotonic() - began >= LIMITS.send_timeout_s
        assert all(len(each._out) < 70_000 for each in served.sockets)
        # What the kernel still had is gone too, once the web server has closed the connection.
        reset = select.poll()
        reset.register(stalled.socket, 0)
        assert reset.poll(10_000)
        assert stalled.closed().reason == "reset"


def test_a_slow_reader_is_not(served: Served) -> None:
    """It takes longer than the timeout in all, but never stops."""
    served.behave = pour
    with served.connect(receive_buffer=4096) as client:
        began, taken = time.monotonic(), 0
        while time.monotonic() - began < 3 * LIMITS.send_timeout_s:
            taken += len(client.text())
            time.sleep(0.005)
    assert taken > 20_000


def test_a_dead_peer_is_found(served: Served) -> None:
    """It leaves pings unanswered. One that answers them may be silent for as long as it likes."""
    served.limits = SocketLimits(ping_interval_s=0.3)
    with served.connect(answers_pings=False) as dead:
        began = time.monotonic()
        assert isinstance(dead.event(), Ping)
        assert dead.closed().code is None
        assert time.monotonic() - began > 0.25
    served.limits = SocketLimits(ping_interval_s=1)
    with served.connect() as alive:
        with pytest.raises(TimeoutError):
            alive.text(2.5)
        alive.send("here")
        assert alive.text() == "here"


def test_a_peer_that_never_closes_its_side(served: Served) -> None:
    """Does not hold the thread for longer than a moment."""
    before = served.ended
    with served.connect() as client:
        client.socket.sendall(frame(BINARY))
        wait_until(lambda: served.ended > before, 5, "the end of the socket")


def test_stop_and_wake(served: Served) -> None:
    """From another thread: any number of wakes, and a close with 1001."""
    woken: list[float] = []

    def listen(served: Socket) -> None:
        while True:
            served.wait(10)
            woken.append(time.monotonic())

    served.behave = listen
    with served.connect() as client:
        for _ in range(3):
            began = time.monotonic()
            before = len(woken)
            for _ in range(10_000):
                served.sockets[-1].wake()
            wait_until(lambda before=before: len(woken) > before, 5, "a wake")  # type: ignore[misc]
            assert time.monotonic() - began < 5
        served.sockets[-1].stop()
        assert client.closed().code == 1001
    served.sockets[-1].wake()


def test_fuzz(served: Served) -> None:
    """Bytes and frames at random, whole and cut short: the server closes, and lets go of all that it used."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))

    def piece() -> bytes:
        payload = choose.randbytes(choose.choice([0, 1, 2, 10, 130, 70_000]))
        match choose.randrange(6):
            case 0:
                return choose.randbytes(choose.randrange(1, 40))
            case 1:
                return frame(choose.randrange(16), payload, length=choose.choice([0, 1, 125, 126, 2**31, 2**62, 2**63]))
            case 2:
                return frame(
                    choose.randrange(256) & 0x7F, payload, fin=choose.random() < 0.5, masked=choose.random() < 0.8
                )
            case 3:
                return frame(
                    choose.choice([TEXT, CONTINUATION]), b"[" * choose.randrange(200), fin=choose.random() < 0.5
                )
            case 4:
                return frame(PING, payload[:125])
            case _:
                whole = frame(choose.choice([TEXT, CLOSE, BINARY]), payload[:125])
                return whole[: choose.randrange(len(whole))]

    for _ in range(150):
        with ExitStack() as stack:
            client = stack.enter_context(served.connect())
            with suppress(ConnectionError, Closed):
                client.socket.sendall(b"".join(piece() for _ in range(choose.randrange(1, 12))))
                if choose.random() < 0.3:
                    # A reset instead of an end.
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif choose.random() < 0.5:
                    client.socket.shutdown(socket.SHUT_WR)
                    client.closed(10)
    served.until_ended()
    wait_until(
        lambda: len(list(Path("/proc/self/fd").iterdir())) <= descriptors, 10, f"{os.getpid()} to close its files"
    )
