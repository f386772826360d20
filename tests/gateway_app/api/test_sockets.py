"""WebSockets: who may open one, and what is said on it. Served by werkzeug in this process, and once by gunicorn."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from simple_websocket import Client, ConnectionClosed  # type: ignore[import-untyped]
from werkzeug.serving import make_server

from gateway_app.api.sockets import Limits
from gateway_app.governance.api_keys import ApiKeys, Caller
from gateway_app.streaming.socket import SocketLimits
from tasks.errors import by_code
from tasks.ids import new_request_id
from tasks.settings import PREFIX as VARIABLE
from tasks.settings import settings
from tasks.stream import Frame, opening, replay
from tests.conftest import ROOT, new_key
from tests.played_worker import TASK, PlayedWorker, result
from tests.services import free_port, wait_until
from tests.socket_gateway import SocketGateway
from tests.websocket_client import HANDSHAKE, Closed, Refused, WebSocketClient, frame

ORIGIN = "https://app.example.org"
LIMITS = Limits(
    allowed_origins=(ORIGIN,),
    watches=120,
    socket=SocketLimits(message_bytes=100_000, send_timeout_s=1.0, ping_interval_s=5.0),
    recheck_key_s=0.3,
)
MOST_SOCKETS = 20


@pytest.fixture
def database_kind() -> str:
    """Return SQLite: what a database is like is no matter here."""
    return "sqlite"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, secrets_directory: object) -> None:
    """Have watchers look into SQL after a moment of silence."""
    monkeypatch.setenv(f"{VARIABLE}STREAMING__HEARTBEAT_S", "0.5")


@pytest.fixture
def worker(client: FlaskClient) -> Iterator[PlayedWorker]:
    """Return the worker, whose client is the gateway's HTTP side."""
    worker = PlayedWorker(client)
    yield worker
    worker.close()


class Service:
    """The routes being served, with a client's key for them."""

    def __init__(self, worker: PlayedWorker) -> None:
        self.http = worker.client
        self.key = new_key("default")
        self.submitted: list[tuple[Caller, Any, str | None]] = []
        self.gateway = SocketGateway(LIMITS, self._submit, self._cancel, MOST_SOCKETS)
        self._server = make_server("127.0.0.1", 0, self.gateway.app, threaded=True)
        self.port = self._server.port
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def connect(self, path: str = "/v1/stream", **options: Any) -> WebSocketClient:
        """Return a client, authenticated if it is not told otherwise."""
        options.setdefault("headers", {"Authorization": f"Bearer {self.key}"})
        return WebSocketClient(self.port, path, **options)

    def refusal(self, path: str = "/v1/stream", **headers: str | None) -> tuple[int, str]:
        """Return the status and the code with which a handshake is refused."""
        with pytest.raises(Refused) as refused:
            self.connect(path, headers=headers)
        return refused.value.status, refused.value.problem["code"]

    def close(self) -> None:
        """End every socket, then the server."""
        self.gateway.sockets.close()
        wait_until(lambda: not self.gateway.sockets.count, 20, "the end of every socket")
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.gateway.closing.close()

    def _submit(self, caller: Caller, task: Any, key: str | None) -> dict[str, Any]:
        self.submitted.append((caller, task, key))
        return _answer(self.http.post("/v1/tasks", data=json.dumps(task), content_type="application/json"))

    def _cancel(self, _caller: Caller, request_id: str) -> dict[str, Any]:
        return _answer(self.http.delete(f"/v1/tasks/{request_id}"))


def _answer(response: Any) -> dict[str, Any]:
    content: dict[str, Any] = response.get_json()
    if response.status_code >= 400:
        raise by_code(content["code"])(content["detail"])
    return content


@pytest.fixture
def service(worker: PlayedWorker) -> Iterator[Service]:
    """Return the service; after the test it still answers."""
    service = Service(worker)
    yield service
    with service.connect() as client:
        client.send({"op": "ping"})
        assert client.receive() == {"op": "pong"}
    service.close()


def sse(client: FlaskClient, request_id: str, cursor: str = "") -> list[dict[str, Any]]:
    """Return what server-sent events say, as the sockets say it."""
    answer = client.get(f"/v1/tasks/{request_id}/events?cursor={cursor}")
    blocks = [block.split("\n") for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    fields = [dict(line.split(": ", 1) for line in block) for block in blocks]
    return [{**each, "data": json.loads(each["data"])} for each in fields]


def shown(frames: list[Frame]) -> list[dict[str, Any]]:
    """Return frames as a client gets them."""
    return [{"id": str(each.cursor), "event": each.event, "data": dict(each.data)} for each in frames]


def finish(worker: PlayedWorker, request_id: str, *texts: str) -> list[Frame]:
    """Run a task to its end; return its frames."""
    attempt = worker.start(request_id)
    answer = result(*texts)
    frames = list(replay(1, answer))
    worker.send(request_id, *frames)
    worker.answer(request_id, attempt, answer)
    return frames


# --- The handshake --------------------------------------------------------------------------------


def test_who_may_open_a_socket(service: Service) -> None:
    """With a key as a header, or as a subprotocol; never with one in the URL."""
    key = service.key
    subprotocols = [f"metaqore.v1, metaqore.key.{key}", f"metaqore.key.{key},metaqore.v1 ,else"]
    for offered in subprotocols:
        with service.connect(headers={"Sec-WebSocket-Protocol": offered}) as client:
            assert client.headers["sec-websocket-protocol"] == "metaqore.v1"
    with service.connect() as client:
        assert "sec-websocket-protocol" not in client.headers
    with service.connect(headers={"Sec-WebSocket-Protocol": f"metaqore.key.{key}"}) as client:
        assert "sec-websocket-protocol" not in client.headers
    refused = (401, "unauthenticated")
    assert service.refusal() == refused
    assert service.refusal(f"/v1/stream?key={key}&access_token={key}") == refused
    assert service.refusal(Authorization="Bearer wrong") == refused
    assert service.refusal(**{"Sec-WebSocket-Protocol": "metaqore.v1"}) == refused
    assert service.refusal(**{"Sec-WebSocket-Protocol": "metaqore.v1, metaqore.key."}) == refused
    assert service.refusal(**{"Sec-WebSocket-Protocol": f"metaqore.v1, metaqore.key.{key}x"}) == refused
    # A header that is wrong is not made right by a subprotocol.
    both = {"Authorization": "Bearer wrong", "Sec-WebSocket-Protocol": f"metaqore.v1, metaqore.key.{key}"}
    assert service.refusal(**both) == refused


def test_which_pages_may(service: Service) -> None:
    """Those of this very host and those listed, to the letter."""
    authorization = {"Authorization": f"Bearer {service.key}"}
    for origin in (None, f"http://127.0.0.1:{service.port}", ORIGIN):
        service.connect(headers={**authorization, "Origin": origin}).socket.close()
    for origin in (
        "null",
        "https://evil.example",
        f"https://127.0.0.1:{service.port}",
        f"http://127.0.0.1:{service.port + 1}",
        "http://127.0.0.1",
        f"http://127.0.0.1:{service.port}/",
        f"http://evil.example@127.0.0.1:{service.port}",
        f"{ORIGIN}.evil.example",
        f"{ORIGIN}:443",
        f"{ORIGIN}, {ORIGIN}",
        ORIGIN.upper(),
        "http://app.example.org",
        "*",
    ):
        assert service.refusal(**authorization, Origin=origin) == (403, "origin_not_allowed"), origin
    # Before the key is looked at.
    assert service.refusal(Origin="https://evil.example") == (403, "origin_not_allowed")


def test_what_is_no_handshake(service: Service, worker: PlayedWorker) -> None:
    """Is answered as HTTP, with what would be one."""
    authorization = {"Authorization": f"Bearer {service.key}"}
    for path in ("/v1/stream", f"/v1/tasks/{worker.submit()}/stream"):
        for headers in ({"Upgrade": None, "Connection": None}, {"Upgrade": "h2c"}, {"Sec-WebSocket-Version": "8"}):
            with pytest.raises(Refused) as refused:
                service.connect(path, headers=authorization | headers)
            assert (refused.value.status, refused.value.problem["code"]) == (426, "upgrade_required")
            assert refused.value.headers["upgrade"] == "websocket"
            assert refused.value.headers["sec-websocket-version"] == "13"
        for nonce in (None, "short", "not base64, not at all", "dGhlIHNhbXBsZSBub25jZQ=", "AAAA"):
            assert service.refusal(path, **authorization, **{"Sec-WebSocket-Key": nonce}) == (422, "invalid_request")
    for method in ("HEAD", "POST"):
        with pytest.raises(Refused) as refused:
            service.connect(method=method)
        assert refused.value.status == 405


def test_odd_headers_do_not_reach_the_handshake(service: Service) -> None:
    """Compression is not agreed to, and what simple-websocket could not read is not shown to it."""
    odd = {
        "Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits",
        "Connection": "keep-alive, Upgrade",
        "X-Odd": "\x01\xfe\xff",
        "Cookie": "é" * 3000,
        "Sec-WebSocket-Protocol": "ünknown",
    }
    with service.connect(headers={"Authorization": f"Bearer {service.key}", **odd}) as client:
        assert "sec-websocket-extensions" not in client.headers
        client.send({"op": "ping"})
        assert client.receive() == {"op": "pong"}


def test_a_client_that_leaves_in_the_handshake(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Is nothing to write about."""
    lines = (f"{name}: {value}" for name, value in {**HANDSHAKE, "Authorization": f"Bearer {service.key}"}.items())
    request = "\r\n".join(["GET /v1/stream HTTP/1.1", *lines, "", ""]).encode()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.sendall(request)
    with service.connect() as other:
        other.send({"op": "ping"})
        assert other.receive() == {"op": "pong"}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_tasks_and_cursors_that_are_not_there(service: Service, worker: PlayedWorker) -> None:
    """Are refused before the handshake; other organizations' tasks are not there either."""
    request_id = worker.submit()
    authorization = {"Authorization": f"Bearer {service.key}"}
    other = {"Authorization": f"Bearer {new_key('other')}"}
    path = f"/v1/tasks/{request_id}/stream"
    assert service.refusal(path) == (401, "unauthenticated")
    assert service.refusal(path, **other) == (404, "not_found")
    assert service.refusal("/v1/tasks/nothing/stream", **authorization) == (404, "not_found")
    assert service.refusal(f"/v1/tasks/{new_request_id()}/stream", **authorization) == (404, "not_found")
    for cursor in ("x", "1-1"):
        assert service.refusal(f"{path}?cursor={cursor}", **authorization) == (400, "invalid_cursor")
    finish(worker, request_id, "one ")
    assert service.refusal(f"{path}?cursor=1-9", **authorization) == (400, "invalid_cursor")


def test_a_socket_too_many(service: Service) -> None:
    """Is refused until one has ended."""
    with ExitStack() as stack:
        clients = [stack.enter_context(service.connect()) for _ in range(MOST_SOCKETS)]
        wait_until(lambda: service.gateway.sockets.count == MOST_SOCKETS, 10, "the sockets")
        refused = service.refusal(Authorization=f"Bearer {service.key}")
        assert refused == (503, "service_unavailable")
        clients[0].socket.sendall(frame(0x8))
        assert clients[0].closed().code == 1005
        wait_until(lambda: service.gateway.sockets.count < MOST_SOCKETS, 10, "room")
        stack.enter_context(service.connect())


def test_a_revoked_key_ends_its_sockets(service: Service, worker: PlayedWorker) -> None:
    """Soon, and nobody else's."""
    keys = ApiKeys(worker.database, settings().secrets.keys("key_pepper"))
    key_id, key = keys.create("default", "short-lived")
    with service.connect() as other, service.connect(headers={"Authorization": f"Bearer {key}"}) as client:
        client.send({"op": "ping"})
        assert client.receive() == {"op": "pong"}
        assert keys.revoke(key_id)
        closed = client.closed(10)
        assert (closed.code, closed.reason) == (1008, "unauthenticated")
        other.send({"op": "ping"})
        assert other.receive() == {"op": "pong"}


# --- One task -------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgotten", [False, True])
def test_one_task_from_every_cursor(service: Service, worker: PlayedWorker, forgotten: bool) -> None:
    """As server-sent events show it, then a close; what the client says is ignored."""
    request_id = worker.submit()
    path = f"/v1/tasks/{request_id}/stream"
    frames = finish(worker, request_id, "One ", "thrée ", "🙂")
    if forgotten:
        worker.redis.flushall()
    for cursor in ("", *(str(each.cursor) for each in frames)):
        with service.connect(f"{path}?cursor={cursor}") as client:
            client.send("whatever")
            assert client.rest() == sse(service.http, request_id, cursor)
    with service.connect(path) as client:
        assert client.rest() == shown(frames)


def test_one_task_while_it_runs(service: Service, worker: PlayedWorker) -> None:
    """From its place in the queue to an end that only the database knows of, through a second attempt."""
    request_id = worker.submit()
    with service.connect(f"/v1/tasks/{request_id}/stream") as client, pytest.raises(TimeoutError):
        client.receive(0.3)
    with service.connect(f"/v1/tasks/{request_id}/stream") as client:
        worker.start(request_id)
        worker.send(request_id, opening(1))
        assert client.receive() == shown([opening(1)])[0]
        attempt = worker.start(request_id)
        answer = result("one ", "two ")
        frames = list(replay(2, answer))
        worker.send(request_id, *frames[:2])
        assert [client.receive() for _ in range(2)] == shown(frames[:2])
        worker.answer(request_id, attempt, answer)
        assert client.rest() == shown(frames[2:])
    with service.connect(f"/v1/tasks/{request_id}/stream?cursor=1-0") as client:
        assert client.rest() == shown(frames)


def test_watching_does_not_cancel(service: Service, worker: PlayedWorker) -> None:
    """However the watcher leaves."""
    request_id = worker.submit()
    with service.connect(f"/v1/tasks/{request_id}/stream") as client:
        client.socket.sendall(frame(0x8))
        client.closed()
    with service.connect() as client:
        client.send({"op": "watch", "id": request_id})
        client.receive()
    wait_until(lambda: not service.gateway.sockets.count, 10, "the end of the sockets")
    assert service.http.get(f"/v1/tasks/{request_id}").json["status"] == "queued"


# --- Many tasks -----------------------------------------------------------------------------------


def test_submit_and_watch(service: Service, worker: PlayedWorker) -> None:
    """The answer is that of the POST, and the frames follow by themselves."""
    with service.connect() as client:
        client.send({"op": "submit", "ref": "mine", "task": TASK, "idempotency_key": "k"})
        accepted = client.receive()
        by_post: dict[str, Any] = service.http.post("/v1/tasks", json=TASK).get_json()
        assert set(accepted) == {"op", "ref", *by_post}
        assert (accepted["op"], accepted["ref"], accepted["status"]) == ("accepted", "mine", "queued")
        caller, task, key = service.submitted[0]
        assert (caller.organization, task, key) == ("default", TASK, "k")
        frames = finish(worker, accepted["id"], "one ", "two ")
        for each in shown(frames):
            assert client.receive() == {"op": "frame", "task": accepted["id"], **each}
        client.send({"op": "ping", "ref": "after"})
        assert client.receive() == {"op": "pong", "ref": "after"}


def test_watch_unwatch_and_cancel(service: Service, worker: PlayedWorker) -> None:
    """One after the other, on one socket."""
    request_id = worker.submit()
    with service.connect() as client:
        client.send({"op": "watch", "id": request_id, "ref": 7})
        assert client.receive()["error"]["code"] == "invalid_request"
        client.send({"op": "watch", "id": request_id, "ref": "w"})
        assert client.receive() == {"op": "watching", "ref": "w", "id": request_id, "status": "queued"}
        attempt = worker.start(request_id)
        answer = result("one ", "two ")
        frames = list(replay(1, answer))
        worker.send(request_id, *frames[:2])
        assert [client.receive()["id"] for _ in range(2)] == ["1-0", "1-1"]
        client.send({"op": "unwatch", "id": request_id})
        assert client.receive() == {"op": "unwatched", "id": request_id}
        worker.send(request_id, *frames[2:])
        worker.answer(request_id, attempt, answer)
        with pytest.raises(TimeoutError):
            client.receive(0.5)
        client.send({"op": "watch", "id": request_id, "cursor": "1-1"})
        assert client.receive()["status"] == "completed"
        assert [client.receive()["id"] for _ in range(2)] == ["1-2", "1-3"]
        client.send({"op": "watch", "id": request_id, "cursor": "1-3"})
        assert [client.receive()["op"] for _ in range(2)] == ["watching", "unwatched"]
        client.send({"op": "watch", "id": request_id, "cursor": "1-4"})
        assert client.receive()["op"] == "watching"
        error = client.receive()
        assert (error["op"], error["id"], error["error"]["code"]) == ("error", request_id, "invalid_cursor")
        client.send({"op": "cancel", "id": request_id, "ref": "c"})
        error = client.receive()
        assert (error["op"], error["ref"], error["error"]["code"]) == ("error", "c", "already_finished")
        client.send({"op": "submit", "task": TASK})
        second = client.receive()["id"]
        client.send({"op": "cancel", "id": second, "ref": "c"})
        answers = [client.receive() for _ in range(2)]
        assert {each["op"] for each in answers} == {"cancelled", "frame"}
        assert all(each.get("event", "cancelled") == "cancelled" for each in answers)


WRONG: tuple[tuple[object, str], ...] = (
    ("", "invalid_json"),
    ("{", "invalid_json"),
    ('{"op": NaN}', "invalid_json"),
    ('{"op": "ping", "ref": "\\ud800"}', "invalid_json"),
    ("[" * 50_000, "invalid_json"),
    ("[]", "invalid_request"),
    ("null", "invalid_request"),
    ("1" * 50_000, "invalid_json"),
    ({}, "invalid_request"),
    ({"op": None}, "invalid_request"),
    ({"op": ["ping"]}, "invalid_request"),
    ({"op": "fly"}, "invalid_request"),
    ({"op": "ping", "more": 1}, "invalid_request"),
    ({"op": "ping", "ref": "x" * 201}, "invalid_request"),
    ({"op": "watch"}, "invalid_request"),
    ({"op": "watch", "id": 3}, "invalid_request"),
    ({"op": "watch", "id": "nothing"}, "not_found"),
    ({"op": "watch", "id": "gw_../../x"}, "not_found"),
    ({"op": "unwatch", "id": "nothing"}, "not_found"),
    ({"op": "cancel", "id": "nothing"}, "not_found"),
    ({"op": "submit"}, "invalid_request"),
    ({"op": "submit", "task": []}, "invalid_request"),
    ({"op": "submit", "task": {"agent": "nobody", "directive": "x"}}, "unknown_agent"),
    ({"op": "submit", "task": TASK, "idempotency_key": ""}, "invalid_request"),
)


def test_what_is_wrong_is_answered(service: Service) -> None:
    """With a problem document, and the socket stays."""
    with service.connect() as client:
        for sent, code in WRONG:
            client.send(sent)
            answer = client.receive()
            assert (answer["op"], answer["error"]["code"]) == ("error", code), sent
            assert answer["error"]["status"] >= 400
        client.send({"op": "ping"})
        assert client.receive() == {"op": "pong"}


def test_other_organizations_tasks_are_not_found(service: Service, worker: PlayedWorker) -> None:
    """Neither to watch nor to cancel."""
    request_id = worker.submit()
    with service.connect(headers={"Authorization": f"Bearer {new_key('other')}"}) as client:
        for operation in ("watch", "cancel"):
            client.send({"op": operation, "id": request_id})
            assert client.receive()["error"]["code"] == "not_found"


def test_many_tasks_take_one_thread(service: Service, worker: PlayedWorker) -> None:
    """As many as one socket may watch, and not one more; each shows its own frames, in order."""
    with service.connect() as client:
        client.send({"op": "ping"})
        client.receive()
        warm = worker.submit()
        client.send({"op": "watch", "id": warm})
        client.receive()
        before = threading.active_count()
        tasks = [warm]
        for number in range(1, LIMITS.watches):
            client.send({"op": "submit", "ref": str(number), "task": TASK})
        for number in range(1, LIMITS.watches):
            accepted = client.receive()
            assert accepted["ref"] == str(number)
            tasks.append(accepted["id"])
        assert threading.active_count() <= before
        for operation in ({"op": "submit", "task": TASK}, {"op": "watch", "id": worker.submit()}):
            client.send(operation)
            assert client.receive()["error"]["code"] == "too_many_watches"
        expected = {request_id: shown(finish(worker, request_id, "a ", request_id)) for request_id in tasks}
        seen: dict[str, list[Any]] = {request_id: [] for request_id in tasks}
        for _ in range(sum(map(len, expected.values()))):
            message = client.receive()
            assert message.pop("op") == "frame"
            seen[message.pop("task")].append(message)
        assert seen == expected
        assert threading.active_count() <= before
        client.send({"op": "submit", "task": TASK})
        assert client.receive()["op"] == "accepted"


def test_a_slow_client_holds_up_nobody(service: Service, worker: PlayedWorker) -> None:
    """It is cut off; its neighbour sees everything in the meantime, and it sees the rest when it comes back."""
    request_id = worker.submit()
    attempt = worker.start(request_id)
    answer = result(*(f"{number} " + "x" * 2000 for number in range(500)))
    frames = list(replay(1, answer))
    path = f"/v1/tasks/{request_id}/stream"
    with service.connect(path, receive_buffer=4096) as slow, service.connect(path) as quick:
        for at in range(0, len(frames) - 1, 20):
            some = frames[at : min(at + 20, len(frames) - 1)]
            worker.send(request_id, *some)
            assert [quick.receive() for _ in some] == shown(some)
        wait_until(lambda: service.gateway.sockets.count == 1, 20, "the end of the slow one")
        worker.send(request_id, frames[-1])
        worker.answer(request_id, attempt, answer)
        assert quick.rest() == shown(frames[-1:])
        got = []
        with suppress(Exception):
            while True:
                got.append(slow.receive(1))
    assert len(got) < len(frames) - 1
    cursor = got[-1]["id"] if got else ""
    with service.connect(f"{path}?cursor={cursor}") as client:
        assert got + client.rest() == shown(frames)


def test_a_bug_is_no_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is told, the log has the place, and neither has what was sent."""
    monkeypatch.setattr(service, "http", None)
    with service.connect() as client:
        client.send({"op": "submit", "ref": "r", "task": TASK})
        answer = client.receive()
        assert (answer["ref"], answer["error"]["code"]) == ("r", "internal_error")
        client.send({"op": "ping"})
        assert client.receive() == {"op": "pong"}


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_has_an_answer(service: Service, data: st.DataObject) -> None:
    """One answer a message, whatever it says."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
    operation = st.sampled_from(["watch", "unwatch", "cancel", "ping", "no"]) | anything
    likely = st.fixed_dictionaries({"op": operation}, optional={"ref": anything, "id": anything, "cursor": anything})
    messages = data.draw(st.lists(likely | anything, min_size=1, max_size=20))
    with service.connect() as client:
        for message in messages:
            client.send(json.dumps(message))
        for _ in messages:
            assert client.receive()["op"] in {"error", "pong"}


# --- The end --------------------------------------------------------------------------------------


def test_closing_ends_every_socket(worker: PlayedWorker) -> None:
    """With 1001, and no more are opened."""
    service = Service(worker)
    path = f"/v1/tasks/{worker.submit()}/stream"
    with service.connect() as one, service.connect(path) as other:
        wait_until(lambda: service.gateway.sockets.count == 2, 10, "both sockets")
        service.gateway.sockets.close()
        assert [client.closed().code for client in (one, other)] == [1001, 1001]
        assert service.refusal(Authorization=f"Bearer {service.key}") == (503, "service_unavailable")
    service.close()


def test_under_gunicorn(worker: PlayedWorker) -> None:
    """The whole gateway: read by a client of another kind, after hostile ones, and while the server stops."""
    port = free_port()
    request_id = worker.submit()
    frames = finish(worker, request_id, "One ", "thrée ", "x" * 300_000)
    headers = {"Authorization": f"Bearer {new_key('default')}"}
    command = (sys.executable, "-m", "gunicorn", "-c", "gateway_app/gunicorn.py", "gateway_app:create_app()")
    environment = os.environ | {"PYTHONPATH": str(ROOT), f"{VARIABLE}GATEWAY__PORT": str(port)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def up() -> bool:
        with suppress(ConnectionRefusedError), WebSocketClient(port, "/v1/stream", headers):
            return True
        return False

    try:
        wait_until(up, 60, "gunicorn")
        client = Client(f"ws://127.0.0.1:{port}/v1/tasks/{request_id}/stream", headers=headers)
        seen = []
        with suppress(ConnectionClosed):
            while True:
                seen.append(json.loads(client.receive(20)))
        assert seen == shown(frames)
        assert client.close_reason == 1000
        for sent in (frame(0x2), random.randbytes(50), frame(0x1, b"x", masked=False)):
            with WebSocketClient(port, "/v1/stream", headers) as hostile:
                hostile.socket.sendall(sent)
                hostile.socket.shutdown(1)
                hostile.closed()
        with WebSocketClient(port, "/v1/stream", headers) as last:
            last.send({"op": "submit", "ref": "r", "task": TASK})
            accepted = last.receive()
            assert accepted["op"] == "accepted"
            last.send({"op": "cancel", "id": accepted["id"]})
            assert {last.receive()["op"] for _ in range(2)} == {"cancelled", "frame"}
            process.send_signal(signal.SIGTERM)
            with suppress(Closed, TimeoutError):
                last.receive(1)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 15
        assert b"Traceback" not in errors, errors.decode()
    finally:
        process.kill()
        process.communicate()
