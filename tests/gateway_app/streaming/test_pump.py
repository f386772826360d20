"""Streams without threads, in this process: each says what it says elsewhere, however its client reads or leaves.

Requests come as gunicorn would hand them over, with their socket; without it, the same application answers as Flask's
own server would, and that is what a stream is compared with. The test stands in for the worker.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import EnvironBuilder

from gateway_app import build
from gateway_app.access import AccessLog
from gateway_app.api import sse
from gateway_app.streaming import pumped, send_timeout
from gateway_app.streaming.pump import Make, Pump
from gateway_app.streaming.pumped import PumpedStream
from gateway_app.streaming.relay import Relay
from gateway_app.streaming.watch import Watcher
from tasks.job import Piece
from tasks.migrating import upgrade
from tasks.settings import PREFIX, settings
from tasks.stream import START, Cursor, Frame, opening, replay
from tests.conftest import new_key
from tests.fleet import own_services
from tests.raw_http import RawClient, without_comments
from tests.services import RedisServer, wait_until
from tests.stand_in import StandIn, result
from tests.workers import ROOT

HEARTBEAT_S = 0.3
#: Entries that a stream holds.
LIMIT = 16
#: Bytes that a connection holds in the kernel, and those that wait for it here, in the tests of slow readers.
SMALL = 8 * 1024
PATIENCE_S = 20.0
TASK = {"agent": "incident-responder", "directive": "What now?"}
CHAT = {"model": "incident-responder", "messages": [{"role": "user", "content": "What now?"}], "stream": True}
ANSWER = result(*(Piece(text=f"{number} ") for number in range(6)))
FRAMES = list(replay(1, ANSWER))
#: Much more than a slow reader's connection holds.
LONG = result(*(Piece(text=f"{number:04d}" * 250) for number in range(300)))


class Place:
    """A gateway whose streams are pumped, and a worker played by the test."""

    def __init__(self) -> None:
        self.app: Flask = build(settings())
        self.pump: Pump = self.app.extensions["pump"]
        self.pump.enabled = True
        self.watcher: Watcher = self.pump.watcher
        self.relay: Relay = self.watcher.relay
        self.client: FlaskClient = self.app.test_client()
        self.client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
        self.worker = StandIn()

    def close(self) -> None:
        """End everything."""
        self.worker.close()
        self.app.extensions["closing"].close()

    def submit(self) -> str:
        """Return a new task's id."""
        request_id: str = self.client.post("/v1/tasks", json=TASK).get_json()["id"]
        return request_id

    def ask(self, method: str, path: str, small: int | None = None, **options: Any) -> RawClient:
        """Ask over a connection; with `small`, it holds little in either direction."""
        return self.connect(lambda environ: self.app(environ, refuse), method, path, small, **options)

    def connect(
        self, answer: Callable[[dict[str, Any]], Any], method: str, path: str, small: int | None = None, **options: Any
    ) -> RawClient:
        """Have `answer` take a connection, with a request on it."""
        client, server = sockets(small)
        environ = EnvironBuilder(method=method, path=path, **options).get_environ() | self.client.environ_base
        environ |= {"gunicorn.socket": server, "SERVER_PROTOCOL": "HTTP/1.1"}
        with pytest.raises(StopIteration):
            answer(environ)
        assert server.fileno() == -1, "the server still has the socket"
        return RawClient(client)

    def make(
        self, request_id: str, make: Make, abandon: Callable[[], None] | None = None, cursor: Cursor = START
    ) -> RawClient:
        """Ask for what `make` makes of a request's frames."""
        response: Any = self.pump.respond(self.watcher.find(request_id, "default"), cursor, make, abandon)
        return self.connect(lambda environ: response(environ, refuse), "GET", "/made")

    @contextmanager
    def chatting(self, small: int | None = None) -> Iterator[tuple[RawClient, str]]:
        """Return a client that waits for a chat's stream, and the request's id."""
        client = self.ask("POST", "/v1/chat/completions", small, json=CHAT)
        with client.socket:
            client.until(b"\r\n\r\n")
            yield client, client.headers["x-request-id"]

    def stream(self, request_id: str) -> PumpedStream:
        """Return the request's only stream, once it is there."""

        def found() -> list[PumpedStream]:
            return [stream for stream in tuple(self.pump.streams) if stream.row.request_id == request_id]

        [stream] = wait_until(found, PATIENCE_S, "the stream")
        return stream

    def watching(self, request_id: str) -> int:
        """Return how many the relay feeds of a request."""
        keys = [key for key in tuple(self.relay._watched) if key.endswith(request_id)]
        return sum(len(self.relay._watched[key]) for key in keys)

    def cancelled(self, request_id: str) -> bool:
        """Tell whether the request was cancelled, or its worker is to end it."""
        row = self.watcher.find(request_id, "default")
        return row.state == "cancelled" or row.cancel_requested_at is not None

    def text(self, path: str, **headers: str) -> bytes:
        """Return what the server without a loop says, but for comments."""
        return without_comments(self.client.get(path, headers=headers).data)


def refuse(*_: Any, **__: Any) -> Any:
    """Start no response: a stream does that itself."""
    raise AssertionError


def sockets(small: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection, the client's first; with `small`, they hold little."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if small is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, small)
        client = socket.socket()
        if small is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, small)
        client.connect(listener.getsockname())
        server, _ = listener.accept()
    return client, server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Place]:
    """Return the gateway that the tests below share."""
    variables = {"STREAMING__HEARTBEAT_S": str(HEARTBEAT_S), "STREAMING__BUFFER_FRAMES": str(LIMIT)}
    with own_services(tmp_path_factory.mktemp("place"), tiny_model, **variables):
        place = Place()
        yield place
        place.close()


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test: no stream, nobody fed by the relay, and every socket closed (a warning is an error)."""
    yield
    if "place" in request.fixturenames:
        place: Place = request.getfixturevalue("place")
        wait_until(lambda: not place.pump.streams and not place.relay._watched, PATIENCE_S, "the streams to be gone")


# --- What is said ---------------------------------------------------------------------------------


def test_every_cursor_while_it_runs(place: Place) -> None:
    """From each place of a running stream, over two attempts, the rest is what is said elsewhere of the finished one."""
    request_id = place.submit()
    place.worker.start(request_id)
    place.worker.send(request_id, *FRAMES[:4])
    second = place.worker.start(request_id)
    again = list(replay(second.number, ANSWER))
    path = f"/v1/tasks/{request_id}/events"
    cursors = [START, *(frame.cursor for frame in (*FRAMES[:4], *again[:3]))]
    clients = [place.ask("GET", f"{path}?cursor={cursor}") for cursor in cursors]
    clients[0].until(b"id: 1-3\n")
    place.worker.send(request_id, *again[:3])
    clients += [place.ask("GET", path, headers={"Last-Event-ID": str(cursor)}) for cursor in cursors]
    place.worker.record(second, ANSWER)
    place.worker.send(request_id, *again[3:])
    for cursor, client in zip(cursors * 2, clients, strict=True):
        body = without_comments(client.to_end())
        assert body == b"".join(sse.of_frame(frame) for frame in (*FRAMES[:4], *again) if frame.cursor > cursor)
        assert body == place.text(path, **{"Last-Event-ID": str(cursor)})


def test_what_redis_forgot_is_said_in_the_end(place: Place) -> None:
    """In the middle of a stream Redis loses some of it: a silence, and after the end the rest from the database."""
    request_id = place.submit()
    attempt = place.worker.start(request_id)
    client = place.ask("GET", path := f"/v1/tasks/{request_id}/events")
    place.worker.send(request_id, *FRAMES[:2])
    client.until(b"id: 1-1\n")
    place.worker.send(request_id, *FRAMES[4:6])
    client.until(sse.HEARTBEAT)
    place.worker.record(attempt, ANSWER)
    place.worker.send(request_id, *FRAMES[6:])
    assert without_comments(client.to_end()) == b"".join(map(sse.of_frame, FRAMES)) == place.text(path)


def test_an_end_that_nobody_tells(place: Place) -> None:
    """The worker was lost after its commit: after a heartbeat, a comment, the rest comes from the database."""
    request_id = place.submit()
    attempt = place.worker.start(request_id)
    client = place.ask("GET", path := f"/v1/tasks/{request_id}/events")
    place.worker.send(request_id, *FRAMES[:2])
    client.until(b"id: 1-1\n")
    place.worker.record(attempt, ANSWER)
    began = time.monotonic()
    body = client.to_end()
    assert time.monotonic() - began < 4 * HEARTBEAT_S
    assert sse.HEARTBEAT in body
    assert without_comments(body) == b"".join(map(sse.of_frame, FRAMES)) == place.text(path)


def test_a_cursor_that_is_never_reached(place: Place) -> None:
    """The stream ends with the request, without a word, as there is nothing after that cursor."""
    request_id = place.submit()
    attempt = place.worker.start(request_id)
    client = place.ask("GET", f"/v1/tasks/{request_id}/events?cursor=1-500")
    client.until(b": watching")
    place.worker.record(attempt, ANSWER)
    place.worker.send(request_id, *FRAMES)
    assert without_comments(client.to_end()) == b""


def test_a_second_answer_that_differs(place: Place) -> None:
    """A chat cannot take back what it said: it ends with an error, and the request, which nobody reads now, too."""
    with place.chatting() as (client, request_id):
        place.worker.start(request_id)
        place.worker.send(request_id, *FRAMES[:3])
        client.until(b'"content":"1 "')
        place.worker.start(request_id)
        place.worker.send(request_id, opening(2), *list(replay(2, result(Piece(text="Another"))))[1:2])
        body = client.to_end()
        assert b"answer_changed" in body
        assert b"[DONE]" not in body
        wait_until(lambda: place.cancelled(request_id), PATIENCE_S, "the request to be cancelled")


# --- Clients that leave ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves(place: Place, how: str, begun: bool) -> None:
    """At once or in the middle, however it leaves: a request that only it waited for is cancelled."""
    with place.chatting() as (client, request_id):
        if begun:
            place.worker.start(request_id)
            place.worker.send(request_id, *FRAMES[:3])
            client.until(b'"content":"1 "')
        left_at = time.monotonic()
        client.leave(how)
        wait_until(lambda: place.cancelled(request_id), PATIENCE_S, "the request to be cancelled")
        assert time.monotonic() - left_at < 1


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_is_gone_before_it_is_answered(place: Place, how: str) -> None:
    """Its stream ends before it begins, is fed by nobody, and is abandoned once."""
    request_id = place.submit()
    abandoned: list[str] = []
    response: Any = place.pump.respond(
        place.watcher.find(request_id, "default"),
        START,
        lambda frames: map(sse.of_frame, frames),
        lambda: abandoned.append(request_id),
    )
    client, server = sockets()
    RawClient(client).leave(how)
    with pytest.raises(StopIteration):
        response({"gunicorn.socket": server, "REQUEST_METHOD": "GET", "PATH_INFO": "/"}, refuse)
    wait_until(lambda: abandoned, PATIENCE_S, "the request to be abandoned")
    wait_until(lambda: not place.pump.streams, PATIENCE_S, "the stream to be gone")
    wait_until(lambda: not place.watching(request_id), PATIENCE_S, "the relay to feed nobody")
    assert abandoned == [request_id]


@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
def test_a_watcher_that_leaves(place: Place, how: str) -> None:
    """Nothing is cancelled, and the relay reads nothing for it any more."""
    request_id = place.submit()
    client = place.ask("GET", f"/v1/tasks/{request_id}/events")
    wait_until(lambda: place.watching(request_id), PATIENCE_S, "the relay to feed it")
    stream = place.stream(request_id)
    client.leave(how)
    wait_until(lambda: not place.watching(request_id), PATIENCE_S, "the relay to forget it")
    wait_until(stream.closed.done, PATIENCE_S, "the stream to be gone")
    assert place.watcher.find(request_id, "default").state == "queued"
    client.socket.close()


def test_a_client_that_talks_while_it_is_answered(place: Place) -> None:
    """A little is ignored, also when it comes with the last words; a lot ends the connection."""
    quiet, loud = place.submit(), place.submit()
    for request_id in (quiet, loud):
        place.worker.start(request_id)
    client = place.ask("GET", f"/v1/tasks/{quiet}/events")
    client.ask("GET", "/healthz")
    place.worker.send(quiet, *FRAMES[:-1])
    client.until(b"id: 1-6\n")
    place.worker.send(quiet, FRAMES[-1])
    wait_until(lambda: place.stream(quiet)._over, PATIENCE_S, "its end")
    client.ask("GET", "/healthz")
    assert without_comments(client.to_end()) == b"".join(map(sse.of_frame, FRAMES))
    client = place.ask("GET", f"/v1/tasks/{loud}/events")
    client.until(b": watching")
    stream = place.stream(loud)
    with suppress(ConnectionError):
        for _ in range(10_000):
            client.socket.sendall(b"?" * 1024)
    assert 64 * 1024 < stream._ignored < 64 * 1024 + 256 * 1024, "not more than one read too many"
    assert client.broken_off()


# --- Clients that read slowly ---------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have little wait for a client."""
    monkeypatch.setattr(pumped, "BUFFER_BYTES", SMALL)


def test_a_reader_that_pauses(place: Place, little: None) -> None:
    """It holds up nobody, little is kept for it, and when it reads again it gets everything, once."""
    request_id = place.submit()
    attempt = place.worker.start(request_id)
    path = f"/v1/tasks/{request_id}/events"
    paused, quick = place.ask("GET", path, SMALL), place.ask("GET", path)
    paused.until(b": watching")
    slow = next(stream for stream in place.pump.streams if stream._transport and little_held(stream))
    frames = list(replay(1, LONG))
    largest = len(sse.of_frame(frames[1])) + 16
    for frame in frames[:-1]:
        place.worker.send(request_id, frame)
        assert len(slow._entries) <= LIMIT
        assert slow._transport is not None
        assert slow._transport.get_write_buffer_size() <= 2 * SMALL + largest
    quick.until(f"id: {frames[-2].cursor}\n".encode())
    assert not slow._attached, "nothing is read for it meanwhile"
    place.worker.record(attempt, LONG)
    place.worker.send(request_id, frames[-1])
    expected = b"".join(map(sse.of_frame, frames))
    assert without_comments(quick.to_end()) == expected
    assert without_comments(paused.to_end()) == expected


def little_held(stream: PumpedStream) -> bool:
    """Tell whether the stream's connection holds little."""
    assert stream._transport is not None
    held: int = stream._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return held <= 4 * SMALL


def test_the_reader_is_dropped_as_the_last_entry_is_taken(place: Place) -> None:
    """The relay finds the stream full, the loop empties it meanwhile, the relay drops it: it is taken up again."""
    request_id = place.submit()
    place.worker.start(request_id)
    client = place.ask("GET", f"/v1/tasks/{request_id}/events")
    place.worker.send(request_id, *FRAMES[:2])
    client.until(b"id: 1-1\n")
    stream = place.stream(request_id)
    with place.relay._lock:
        stream._limit = 0
        assert not stream.offer((FRAMES[2].cursor, b"that there is no room for"))
        place.relay._drop(stream)
        stream._limit = LIMIT
    place.worker.send(request_id, *FRAMES[2:])
    began = time.monotonic()
    assert without_comments(client.to_end()) == b"".join(map(sse.of_frame, FRAMES))
    assert time.monotonic() - began < PATIENCE_S / 4


def test_a_reader_that_takes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut off, and what only it waited for is cancelled; one that takes a little now and then is not."""
    monkeypatch.setattr(send_timeout, "STALL_S", 0.5)
    # Too much to be taken in that time.
    monkeypatch.setattr(pumped, "BUFFER_BYTES", 8 * SMALL)
    with place.chatting(SMALL) as (client, request_id):
        watched = place.submit()
        slow = place.ask("GET", f"/v1/tasks/{watched}/events", SMALL)
        for each in (request_id, watched):
            place.worker.start(each)
            place.worker.send(each, *list(replay(1, LONG))[:-1])
        stream = place.stream(watched)
        began = time.monotonic()
        while time.monotonic() - began < 4 * 0.5:
            slow.more(1024)
            time.sleep(0.02)
        assert not stream.closed.done()
        assert place.cancelled(request_id)
        assert client.broken_off()
        slow.leave()


@pytest.mark.parametrize("reads", [False, True])
def test_an_end_that_is_not_taken(place: Place, monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """A client that leaves the last words lie, or has them and does not close, is not waited for forever."""
    monkeypatch.setattr(send_timeout, "STALL_S", 0.3)
    monkeypatch.setattr(send_timeout, "LINGER_S", 0.3)
    request_id = place.submit()
    client = place.ask("GET", f"/v1/tasks/{request_id}/events", SMALL)
    stream = place.stream(request_id)
    place.worker.run(request_id, result(*(Piece(text="word " * 200) for _ in range(60))))
    while reads and client.more():
        pass
    wait_until(stream.closed.done, PATIENCE_S, "the connection to be closed")
    assert stream._over, "it was all written before"
    assert client.received.endswith(b"0\r\n\r\n") is reads
    client.socket.close()


# --- Faults ---------------------------------------------------------------------------------------


def test_a_stream_that_cannot_be_made(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """It alone is closed, whatever else comes for it; it is abandoned, and the log says nothing of what was in it."""
    request_id = place.submit()
    abandoned: list[str] = []
    lines = io.StringIO()
    place.pump.access = AccessLog([logging.StreamHandler(lines)], as_json=True)

    def broken(frames: Iterable[Frame | None]) -> Iterator[bytes]:
        for frame in frames:
            if frame is not None and frame.event == "delta":
                for stream in tuple(place.pump.streams):
                    place.pump.wake(stream)
                raise ValueError(f"no words for {frame.data['text']!r}")
            yield sse.of_frame(frame)

    with caplog.at_level(logging.DEBUG):
        good = place.ask("GET", f"/v1/tasks/{request_id}/events")
        bad = place.make(request_id, broken, lambda: abandoned.append(request_id))
        wait_until(lambda: place.watching(request_id) == 2, PATIENCE_S, "both to be fed")
        said = result(*(Piece(text=f"secret{number} ") for number in range(6)))
        place.worker.run(request_id, said)
        assert bad.broken_off(), "the client must not take this for the end"
        assert without_comments(good.to_end()) == b"".join(map(sse.of_frame, replay(1, said)))
    wait_until(lambda: abandoned, PATIENCE_S, "it to be abandoned")
    (fault,) = (record.msg for record in caplog.records if isinstance(record.msg, dict))
    assert fault == {"event": "unexpected error in a stream", "request_id": request_id, "error": "ValueError"}
    wait_until(lambda: lines.getvalue().count("\n") == 2, PATIENCE_S, "both to have a line")
    ends = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert sorted((end["request_id"], end["outcome"]) for end in ends) == [
        (request_id, "broken_off"),
        (request_id, "ended"),
    ]
    assert "secret" not in caplog.text + lines.getvalue()
    assert abandoned == [request_id]


def test_an_abandoning_that_fails(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged without what it says, and the thread that did it goes on."""
    request_id = place.submit()

    def fail() -> None:
        raise ValueError("secret")

    place.make(request_id, lambda frames: map(sse.of_frame, frames), fail).leave()
    wait_until(lambda: "unexpected error beside the streams" in caplog.text, PATIENCE_S, "the log line")
    assert "secret" not in caplog.text


@contextmanager
def apart(redis: RedisServer, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Return a gateway on a Redis that the test may harm."""
    for name, value in {
        "REDIS_URL": redis.url,
        "DATABASE_URL": f"sqlite:///{folder / 'gateway.db'}",
        f"{PREFIX}ENGINE__KIND": "simulated",
        f"{PREFIX}ENGINE__MODEL": str(model),
        f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY": str(ROOT / "profiles"),
        f"{PREFIX}STREAMING__HEARTBEAT_S": str(HEARTBEAT_S),
    }.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    upgrade(settings().database.url)
    place = Place()
    try:
        yield place
    finally:
        place.close()


def test_redis_is_killed_and_comes_back(
    own_redis: RedisServer, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a stream, for two seconds: heartbeats meanwhile, and then the rest; also for one that came."""
    with apart(own_redis, tmp_path, tiny_model, monkeypatch) as place:
        request_id = place.submit()
        place.worker.start(request_id)
        client = place.ask("GET", path := f"/v1/tasks/{request_id}/events")
        place.worker.send(request_id, *FRAMES[:3])
        client.until(b"id: 1-2\n")
        own_redis.kill()
        late = place.ask("GET", path)
        time.sleep(2)
        own_redis.start()
        wait_until(place.worker.redis.ping, PATIENCE_S, "redis")
        place.worker.send(request_id, *FRAMES[3:])
        body = client.to_end()
        assert body.count(sse.HEARTBEAT) >= 3
        assert without_comments(body) == without_comments(late.to_end()) == b"".join(map(sse.of_frame, FRAMES))


def test_redis_hangs(own_redis: RedisServer, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers nobody: a client that comes now waits alone, the others hear that they are not forgotten."""
    with apart(own_redis, tmp_path, tiny_model, monkeypatch) as place:
        first, second = place.submit(), place.submit()
        there = place.ask("GET", f"/v1/tasks/{first}/events")
        wait_until(lambda: place.watching(first), PATIENCE_S, "it to be fed")
        assert own_redis.pid is not None
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            comes = place.ask("GET", f"/v1/tasks/{second}/events")
            for client in (there, comes):
                seen = client.received.count(sse.HEARTBEAT)
                began = time.monotonic()
                while client.received.count(sse.HEARTBEAT) < seen + 3:
                    assert client.more()
                assert time.monotonic() - began < 3
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
        place.worker.run(second, ANSWER)
        assert without_comments(comes.to_end()) == b"".join(map(sse.of_frame, FRAMES))
        there.leave()


# --- Beginning and ending -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "taken"),
    [
        ({}, True),
        ({"SERVER_PROTOCOL": "HTTP/1.0"}, True),
        ({"SERVER_PROTOCOL": "HTTP/2"}, False),
        ({"SERVER_PROTOCOL": "HTTP/2.0"}, False),
        ({"REQUEST_METHOD": "HEAD"}, False),
        ({"gunicorn.socket": None}, False),
        ({"gunicorn.socket": ssl.SSLSocket.__new__(ssl.SSLSocket)}, False),
    ],
)
def test_which_sockets_are_taken(place: Place, changed: dict[str, Any], taken: bool) -> None:
    """Plain ones that carry one request; TLS and HTTP/2 are the server's, and HEAD wants no stream."""
    with socket.socket() as plain:
        environ = {"gunicorn.socket": plain, "SERVER_PROTOCOL": "HTTP/1.1", "REQUEST_METHOD": "GET"} | changed
        assert place.pump.takes(environ) is taken
        other = Pump(place.watcher)
        assert not other.takes(environ), "not unless the server says so"
        other.close()


def test_streams_that_come_while_it_closes(place: Place) -> None:
    """Threads begin streams as the pump is closed: each is ended or refused, and no thread of it is left."""
    pump = Pump(place.watcher)
    pump.enabled = True
    row = place.watcher.find(place.submit(), "default")
    clients: list[socket.socket] = []
    refused: list[RuntimeError] = []
    closing = threading.Barrier(5)

    def begin() -> None:
        closing.wait()
        while not refused:
            client, server = sockets()
            clients.append(client)
            response: Any = pump.respond(row, START, lambda frames: map(sse.of_frame, frames))
            try:
                response({"gunicorn.socket": server, "REQUEST_METHOD": "GET", "PATH_INFO": "/"}, refuse)
            except StopIteration:
                continue
            except RuntimeError as error:
                refused.append(error)
                server.close()

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    closing.wait()
    wait_until(lambda: len(pump.streams) > 10, PATIENCE_S, "streams")
    pump.close()
    for thread in threads:
        thread.join()
    assert refused
    assert not pump.streams
    for client in clients:
        assert RawClient(client).broken_off()
    assert not any(thread.name == "stream-pump" and thread is pump._thread for thread in threading.enumerate())


def test_a_graceful_end(place: Place) -> None:
    """Streams that end within the grace are whole, the others are broken off, and it takes no longer than needed."""
    pump = Pump(place.watcher)
    short, long = place.submit(), place.submit()
    clients = []
    for request_id in (short, long):
        response: Any = pump.respond(
            place.watcher.find(request_id, "default"), START, lambda frames: map(sse.of_frame, frames)
        )

        def answer(environ: dict[str, Any], response: Any = response) -> Any:
            return response(environ, refuse)

        clients.append(place.connect(answer, "GET", "/"))
    wait_until(lambda: place.watching(short) and place.watching(long), PATIENCE_S, "both to be fed")
    ending = threading.Thread(target=pump.close, args=(1.0,))
    began = time.monotonic()
    ending.start()
    place.worker.run(short, ANSWER)
    assert without_comments(clients[0].to_end()) == b"".join(map(sse.of_frame, FRAMES))
    assert ending.is_alive()
    assert clients[1].broken_off()
    ending.join()
    assert 1.0 <= time.monotonic() - began < 2.0
