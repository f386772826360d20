"""Streams without threads under gunicorn, as production runs it: framing, costs, logs, stops and kills.

The test stands in for the worker. What a stream says is compared with what the same application says in this process,
where it has no socket to take.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import redis
import requests
from flask.testing import FlaskClient

from gateway_app import build
from gateway_app.api import sse
from tasks.job import Piece
from tasks.settings import settings
from tasks.stream import START, replay
from tests.conftest import new_key
from tests.fleet import Gateway, own_services
from tests.raw_http import RawClient, without_comments
from tests.services import wait_until
from tests.stand_in import StandIn, result

HEARTBEAT_S = 0.5
GRACEFUL_S = 5
#: What gunicorn.py keeps of it.
CLOSING_S = 2.0
PATIENCE_S = 30.0
SECRET = "A word that no log may hold"
TASK = {"agent": "incident-responder", "directive": SECRET}
CHAT = {
    "model": "incident-responder",
    "messages": [{"role": "user", "content": SECRET}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
RESPONSE = {"model": "incident-responder", "input": SECRET, "stream": True}
ANSWER = result(*(Piece(text=f"{number} thrée ") for number in range(6)))
FRAMES = list(replay(1, ANSWER))
SAID = b"".join(map(sse.of_frame, FRAMES))


class Served:
    """Three gateway processes on the same services: one to be shared, one to be stopped, one to be killed."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.environment = environment
        self.key = new_key("default")
        self.worker = StandIn()
        self.app = build(settings())
        self.logs = [folder / f"{name}.log" for name in ("shared", "stopped", "killed")]
        stopping = {"GUNICORN_CMD_ARGS": f"--graceful-timeout {GRACEFUL_S}"}
        self.gateways = [Gateway(log, os.environ | environment | stopping) for log in self.logs]
        self.shared, self.stopped, self.killed = self.gateways

    def ready(self) -> bool:
        """Tell whether all of them answer."""
        with suppress(requests.ConnectionError):
            return all(requests.get(f"{gateway.url}/healthz", timeout=10).ok for gateway in self.gateways)
        return False

    def close(self) -> None:
        """End everything."""
        for gateway in self.gateways:
            gateway.kill()
        self.worker.close()
        self.app.extensions["closing"].close()

    @property
    def client(self) -> FlaskClient:
        """Return a client of the application in this process."""
        client = self.app.test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {self.key}"
        return client

    def web(self, gateway: Gateway | None = None) -> psutil.Process:
        """Return the process that answers."""
        [worker] = psutil.Process((gateway or self.shared).process.pid).children()
        return worker

    def connected(self) -> int:
        """Return how many connections of clients the shared gateway has open."""
        port = urlsplit(self.shared.url).port
        return sum(bool(each.raddr and each.laddr.port == port) for each in self.web().net_connections("tcp"))

    def log(self, gateway: Gateway | None = None) -> str:
        """Return what a gateway has logged."""
        return self.logs[self.gateways.index(gateway or self.shared)].read_text("utf-8")

    def submit(self) -> str:
        """Return a new task's id."""
        request_id: str = self.client.post("/v1/tasks", json=TASK).get_json()["id"]
        return request_id

    def ask(self, method: str, path: str, gateway: Gateway | None = None, **options: Any) -> RawClient:
        """Send a request, and return its client once the answer has begun."""
        client = RawClient.to((gateway or self.shared).url)
        client.ask(method, path, Authorization=f"Bearer {self.key}", **options)
        client.until(b"\r\n\r\n")
        return client

    def watch(self, request_id: str, gateway: Gateway | None = None, **options: Any) -> RawClient:
        """Watch a request's events."""
        return self.ask("GET", f"/v1/tasks/{request_id}/events", gateway, **options)

    def state(self, request_id: str) -> str:
        """Return a request's state, `cancelling` if its worker is to end it."""
        shown = self.client.get(f"/v1/tasks/{request_id}").get_json()
        return "cancelling" if shown["cancelling"] else str(shown["status"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """Return the gateways that the tests below share."""
    folder = tmp_path_factory.mktemp("served")
    with own_services(folder, tiny_model, STREAMING__HEARTBEAT_S=str(HEARTBEAT_S)) as environment:
        served = Served(folder, environment)
        try:
            wait_until(served.ready, 60, "the gateways")
            yield served
        finally:
            served.close()


@contextmanager
def elsewhere(served: Served, method: str, path: str, count: int = 1, **options: Any) -> Iterator[list[bytes]]:
    """Ask the application in this process, in threads; the list has the bodies in the end."""
    bodies: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: bodies.append(served.client.open(path, method=method, **options).data))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    yield bodies
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(bodies) == count


# --- What comes over the wire ---------------------------------------------------------------------


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_events_from_every_cursor(served: Served, version: str) -> None:
    """In chunks, or for an old client up to the end of the connection: what is said elsewhere, running or finished."""
    request_id = served.submit()
    attempt = served.worker.start(request_id)
    served.worker.send(request_id, *FRAMES[:4])
    path = f"/v1/tasks/{request_id}/events"
    cursors = [START, *(frame.cursor for frame in FRAMES[:4])]
    with elsewhere(served, "GET", path) as bodies:
        clients = [served.ask("GET", f"{path}?cursor={cursor}", version=version) for cursor in cursors]
        served.worker.record(attempt, ANSWER)
        served.worker.send(request_id, *FRAMES[4:])
        running = [client.to_end() for client in clients]
    for cursor, client, body in zip(cursors, clients, running, strict=True):
        assert body.startswith(b": watching\n\n")
        assert without_comments(body) == b"".join(sse.of_frame(frame) for frame in FRAMES if frame.cursor > cursor)
        assert (
            body
            == served.client.get(f"{path}?cursor={cursor}").data
            == served.ask("GET", f"{path}?cursor={cursor}", version=version, Connection="close").to_end()
        )
        assert client.headers.get("transfer-encoding") == ("chunked" if version == "HTTP/1.1" else None)
    assert [running[0]] == bodies


def test_a_chat(served: Served) -> None:
    """The same bytes as elsewhere, while it runs and when it is repeated; the headers are those of any stream."""
    key = {"Idempotency-Key": f"chat-{time.monotonic()}"}
    client = served.ask("POST", "/v1/chat/completions", body=CHAT, Idempotency_Key=key["Idempotency-Key"])
    headers = client.headers
    request_id = headers["x-request-id"]
    with elsewhere(served, "POST", "/v1/chat/completions", json=CHAT, headers=key) as bodies:
        again = served.ask("POST", "/v1/chat/completions", body=CHAT, Idempotency_Key=key["Idempotency-Key"])
        served.worker.run(request_id, ANSWER)
        body = client.to_end()
        assert again.to_end() == body
    finished = served.client.post("/v1/chat/completions", json=CHAT, headers=key)
    assert finished.headers["Idempotent-Replayed"] == again.headers["idempotent-replayed"] == "true"
    assert {body, *map(without_heartbeats, bodies), finished.data} == {body}
    assert body.endswith(b"data: [DONE]\n\n")
    assert "idempotent-replayed" not in headers
    assert headers.pop("date")
    assert headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "x-request-id": request_id,
        "cache-control": "no-cache, no-transform",
        "x-accel-buffering": "no",
        "connection": "close",
        "transfer-encoding": "chunked",
    }
    for name in ("content-type", "x-request-id", "cache-control", "x-accel-buffering"):
        assert finished.headers[name] == headers[name]


def without_heartbeats(body: bytes) -> bytes:
    """Return a body without the comments that depend on time."""
    return body.replace(sse.HEARTBEAT, b"")


@pytest.mark.parametrize("background", [False, True])
def test_a_response(served: Served, background: bool) -> None:
    """The same events as elsewhere, from the first one and after every number."""
    body = RESPONSE | {"background": background}
    client = served.ask("POST", "/v1/responses", body=body)
    response_id = client.headers["x-request-id"]
    attempt = served.worker.start(response_id)
    served.worker.send(response_id, *FRAMES[:3])
    path = f"/v1/responses/{response_id}?stream=true"
    client.until(b"response.output_text.delta")
    with elsewhere(served, "GET", path) as bodies:
        resumed = [served.ask("GET", f"{path}&starting_after={number}") for number in range(12)]
        served.worker.record(attempt, ANSWER)
        served.worker.send(response_id, *FRAMES[3:])
        whole = client.to_end()
    assert {whole, *map(without_heartbeats, bodies), served.client.get(path).data} == {whole}
    events = [block + b"\n\n" for block in whole.split(b"\n\n")[:-1]]
    assert len(events) > len(resumed)
    for number, other in enumerate(resumed):
        assert without_comments(other.to_end()) == b"".join(events[number + 1 :])
        assert served.client.get(f"{path}&starting_after={number}").data == b"".join(events[number + 1 :])


def test_who_asks_for_the_head_gets_no_stream(served: Served) -> None:
    """Headers and the end, at once, of a request that runs."""
    request_id = served.submit()
    client = served.ask("HEAD", f"/v1/tasks/{request_id}/events", Connection="close")
    with client.socket:
        while client.more():
            pass
    assert client.status == 200
    assert client.headers["content-type"].startswith("text/event-stream")
    assert client.received.endswith(b"\r\n\r\n")
    assert client.received.count(b"\r\n\r\n") == 1


def test_a_request_behind_the_first_is_not_answered(served: Served) -> None:
    """Sent together with it, or while it is answered: the connection is said to close, and does."""
    request_id = served.submit()
    client = RawClient.to(served.shared.url)
    for path in (f"/v1/tasks/{request_id}/events", "/healthz"):
        client.ask("GET", path, Authorization=f"Bearer {served.key}")
    client.until(b": watching")
    client.ask("GET", "/healthz")
    served.worker.run(request_id, ANSWER)
    assert without_comments(client.to_end()) == SAID


# --- What it costs --------------------------------------------------------------------------------


def test_streams_have_no_threads_and_no_connections(served: Served) -> None:
    """Fifty streams: the same threads and connections to Redis as one, and an open file each, which it gives back."""
    web, client = served.web(), redis.Redis.from_url(served.environment["REDIS_URL"])

    def connections() -> int:
        listed: Any = client.client_list(_type="normal")
        return len(listed)

    one = served.submit()
    warm = [served.watch(one) for _ in range(2)]
    for watcher in warm:
        watcher.until(sse.HEARTBEAT)
    threads, connected = web.num_threads(), connections()
    watchers = [served.watch(one) for _ in range(50)]
    for watcher in watchers:
        watcher.until(sse.HEARTBEAT)
    # gunicorn starts a thread for a request when none is free; while fifty are begun, few are at once.
    assert web.num_threads() <= threads + 8
    assert connections() <= connected + 4
    assert served.connected() == 52
    served.worker.run(one, ANSWER)
    for watcher in (*warm, *watchers):
        assert without_comments(watcher.to_end()) == SAID
    wait_until(lambda: served.connected() == 0, PATIENCE_S, "the connections to be closed")
    client.close()


def test_a_finished_answer_that_nobody_takes_holds_no_thread(served: Served) -> None:
    """Thirty clients that ask for a long answer, which has ended, and then read nothing of it."""
    request_id = served.submit()
    served.worker.run(request_id, ANSWER.model_copy(update={"pieces": (Piece(text="x" * 20_000),) * 200}))
    web = served.web()
    threads = web.num_threads()
    watchers = [served.watch(request_id) for _ in range(30)]
    assert web.num_threads() <= threads + 8
    assert without_comments(watchers[0].to_end()).count(b"x" * 20_000) == 200
    for watcher in watchers[1:]:
        watcher.socket.close()
    wait_until(lambda: served.connected() == 0, PATIENCE_S, "the connections to be closed")


def test_no_file_is_left(served: Served) -> None:
    """Clients that come then wait, and the streams there are go on, until there are files again."""
    web = served.web()
    request_id = served.submit()
    watcher = served.watch(request_id)
    watcher.until(sse.HEARTBEAT)
    before, heard = web.rlimit(psutil.RLIMIT_NOFILE), watcher.received.count(sse.HEARTBEAT)
    try:
        web.rlimit(psutil.RLIMIT_NOFILE, (3, before[1]))
        waiting = [RawClient.to(served.shared.url) for _ in range(10)]
        for client in waiting:
            client.ask("GET", f"/v1/tasks/{request_id}/events", Authorization=f"Bearer {served.key}")
        wait_until(lambda: "no file is left" in served.log(), PATIENCE_S, "the warning")
        while watcher.received.count(sse.HEARTBEAT) == heard:
            assert watcher.more()
    finally:
        web.rlimit(psutil.RLIMIT_NOFILE, before)
    for client in waiting:
        client.until(b": watching")
    served.worker.run(request_id, ANSWER)
    for client in (watcher, *waiting):
        assert without_comments(client.to_end()) == SAID
    assert served.web().pid == web.pid
    assert served.log().count("no file is left") == 1


# --- Who leaves, who stays, and what is logged -----------------------------------------------------


@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_client_that_leaves(served: Served, how: str, api: str) -> None:
    """Its request is cancelled within a second, while another, who only watches it, cancels nothing."""
    path, body = {"chat": ("/v1/chat/completions", CHAT), "responses": ("/v1/responses", RESPONSE)}[api]
    client = served.ask("POST", path, body=body)
    request_id = client.headers["x-request-id"]
    served.worker.start(request_id)
    served.worker.send(request_id, *FRAMES[:3])
    client.until("thrée".encode())
    watcher = served.watch(request_id)
    watcher.until(b"id: 1-2\n")
    watcher.leave(how)
    time.sleep(0.3)
    assert served.state(request_id) == "running"
    left_at = time.monotonic()
    client.leave(how)
    wait_until(lambda: served.state(request_id) == "cancelling", PATIENCE_S, "it to be cancelled")
    assert time.monotonic() - left_at < 1
    client.socket.close()
    watcher.socket.close()


def test_the_log(served: Served) -> None:
    """A line in the end of each stream, as gunicorn's own are; no query, no text, and no fault."""
    before = len(served.log())
    request_id = served.submit()
    path = f"/v1/tasks/{request_id}/events"
    whole, broken = served.ask("GET", f"{path}?cursor=0-0"), served.ask("GET", f"{path}?cursor=0-0")
    broken.leave()

    def ended(how: str) -> dict[str, Any]:
        lines = [json.loads(line) for line in served.log().splitlines() if request_id in line]
        return next((line for line in lines if line.get("outcome") == how), {})

    wait_until(lambda: ended("broken_off"), PATIENCE_S, "its line")
    served.worker.run(request_id, ANSWER)
    size = len(whole.to_end())
    line = wait_until(lambda: ended("ended"), PATIENCE_S, "its line")
    assert datetime.fromisoformat(line.pop("timestamp")).utcoffset() == timedelta(0)
    assert 0 < line.pop("duration_ms") < PATIENCE_S * 1000
    assert line == {
        "level": "info",
        "logger": "access",
        "event": "request",
        "request_id": request_id,
        "outcome": "ended",
        "method": "GET",
        "route": "/v1/tasks/<request_id>/events",
        "status": 200,
        "sent": size,
    }
    assert len(re.findall(request_id, served.log())) == 2, "each stream has a line"
    for word in (SECRET, "cursor=", "thrée", served.key, " 500 "):
        assert word not in served.log()
    for word in ("Traceback", '"error"'):
        assert word not in served.log()[before:]


# --- Stops and kills ------------------------------------------------------------------------------


def test_a_graceful_stop(served: Served) -> None:
    """Streams may end within the grace, then they are broken off; what nobody reads any more is cancelled."""
    short, long = served.submit(), served.submit()
    ends, stays = served.watch(short, served.stopped), served.watch(long, served.stopped)
    chat = served.ask("POST", "/v1/chat/completions", served.stopped, body=CHAT)
    for client in (ends, stays):
        client.until(sse.HEARTBEAT)
    began = time.monotonic()
    served.stopped.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    served.worker.run(short, ANSWER)
    assert without_comments(ends.to_end()) == SAID
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{served.stopped.url}/healthz", timeout=5)
    assert stays.broken_off()
    assert chat.broken_off()
    assert GRACEFUL_S - CLOSING_S - 0.5 <= time.monotonic() - began < GRACEFUL_S
    assert served.stopped.process.wait(GRACEFUL_S) == 0
    assert time.monotonic() - began < GRACEFUL_S + 1
    assert served.state(chat.headers["x-request-id"]) == "cancelled"
    assert served.state(long) == "queued"
    log = served.log(served.stopped)
    assert "Traceback" not in log
    assert "ERROR" not in log
    served.worker.run(long, ANSWER)
    assert without_comments(served.watch(long, Connection="close").to_end()) == SAID


def test_a_client_of_a_killed_gateway_goes_on_at_another(served: Served) -> None:
    """From its cursor on it gets the rest, of events and of a response: together they are the whole."""
    request_id = served.submit()
    events = served.watch(request_id, served.killed)
    response = served.ask("POST", "/v1/responses", served.killed, body=RESPONSE | {"background": True})
    response_id = response.headers["x-request-id"]
    attempts = {each: served.worker.start(each) for each in (request_id, response_id)}
    for each in attempts:
        served.worker.send(each, *FRAMES[:4])
    events.until(b"id: 1-3\n")
    response.until(b"2 thr")
    served.killed.kill()
    seen = []
    for client in (events, response):
        assert client.broken_off()
        content = client.received.partition(b"\r\n\r\n")[2]
        blocks = re.findall(rb"(?:id|event): .*?\n\n", content, re.DOTALL)
        seen.append(without_comments(b"".join(blocks)))
    last = seen[0].rpartition(b"id: ")[2].partition(b"\n")[0].decode()
    number = json.loads(seen[1].rpartition(b"data: ")[2])["sequence_number"]
    rest = [
        served.watch(request_id, Last_Event_ID=last),
        served.ask("GET", f"/v1/responses/{response_id}?stream=true&starting_after={number}"),
    ]
    for each, attempt in attempts.items():
        served.worker.record(attempt, ANSWER)
        served.worker.send(each, *FRAMES[4:])
    whole = [before + without_comments(client.to_end()) for before, client in zip(seen, rest, strict=True)]
    assert whole == [SAID, served.client.get(f"/v1/responses/{response_id}?stream=true").data]
