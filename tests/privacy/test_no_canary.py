"""Whatever clients send, and whatever the model answers, in ordinary calls and in those that fail: nothing of it is to be
found in logs, metrics, traces, Redis, the dashboard, or what a crash leaves.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import redis
import requests
from celery import Celery

from tasks.prompts.tokenizer import ModelTokenizer
from tasks.queueing.keys import QueueKeys
from tasks.queueing.scripts import Scripts
from tests.privacy.canaries import Canaries
from tests.privacy.whole import FAILS, KILLS, SOON_S, Whole, whole
from tests.services import wait_until

AGENT = "incident-responder"


@pytest.fixture(scope="module")
def canaries(tiny_model: Path) -> Canaries:
    """Return what makes the secrets of this module."""
    return Canaries(ModelTokenizer(tiny_model).encode_plain)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Whole]:
    """Return the gateway that the tests of this module share, in their order."""
    with whole(tmp_path_factory.mktemp("privacy"), tiny_model) as made:
        yield made


#: W3C asks for it to be passed on, so it is in messages and in spans. What is forged in Redis is in Redis.
PASSED_ON = {"spans": ("tracestate",), "Redis": ("tracestate", "forged message")}


def check(site: Whole, canaries: Canaries) -> None:
    """Check that nothing tells anything."""
    told = site.told()
    assert all(told.values()), "each place must have something to read"
    found = {
        place: [one for one in canaries.found_in(content) if not one.startswith(PASSED_ON.get(place, ()))]
        for place, content in told.items()
    }
    assert {place: leaks for place, leaks in found.items() if leaks} == {}


def post(site: Whole, path: str, body: Any, **headers: str) -> requests.Response:
    """Send a body as JSON."""
    return requests.post(f"{site.gateway.url}{path}", json=body, headers=site.headers | headers, timeout=SOON_S)


def task(directive: str, **more: Any) -> dict[str, Any]:
    """Return the body of a short task."""
    return {"agent": AGENT, "directive": directive, "sampling": {"max_tokens": 12, "seed": 1}, **more}


def state_of(site: Whole, request_id: str) -> str:
    """Return the state of a request."""
    found = requests.get(f"{site.gateway.url}/v1/tasks/{request_id}", headers=site.headers, timeout=SOON_S)
    state: str = found.json()["status"]
    return state


def wait_for(site: Whole, answer: requests.Response, state: str) -> str:
    """Return the id of a task that was accepted, once it is in a state."""
    assert answer.status_code == 202, answer.text
    request_id: str = answer.json()["id"]
    wait_until(lambda: state_of(site, request_id) == state, SOON_S, f"{request_id} to be {state}")
    return request_id


def raw(site: Whole, content: bytes) -> bytes:
    """Send bytes as they are; return the answer."""
    parts = urlsplit(site.gateway.url)
    with socket.create_connection((parts.hostname, parts.port), SOON_S) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_ordinary_calls(site: Whole, canaries: Canaries) -> None:
    """Each place in which a request may have text of a client, and the answer's own."""
    canaries.add("API key", site.key)
    headers = {
        "Idempotency-Key": canaries("idempotency key"),
        "User-Agent": canaries("user agent"),
        "Cookie": f"a={canaries('cookie')}",
        "X-Request-Id": canaries("request id"),
        "tracestate": f"vendor={canaries('tracestate')}",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    body = task(
        canaries("directive"),
        context={canaries("context's key"): canaries("context")},
        metadata={"note": canaries("metadata")},
    )
    body["sampling"]["stop"] = [canaries("stop")]
    accepted = post(site, f"/v1/tasks?note={canaries('query')}", body, **headers)
    request_id = wait_for(site, accepted, "completed")
    shown = requests.get(f"{site.gateway.url}/v1/tasks/{request_id}", headers=site.headers, timeout=SOON_S).json()
    canaries.add("answer", shown["result"]["text"].strip())
    tools = [
        {
            "type": "function",
            "function": {
                "name": canaries("tool's name"),
                "description": canaries("tool's description"),
                "parameters": {"type": "object", "properties": {canaries("tool's parameter"): {"type": "string"}}},
            },
        }
    ]
    chat = {
        "model": AGENT,
        "messages": [
            {"role": "system", "content": canaries("system message")},
            {"role": "user", "content": canaries("user message")},
            {"role": "assistant", "content": canaries("assistant message")},
            {"role": "user", "content": "go on"},
        ],
        "max_tokens": 12,
        "user": canaries("user"),
    }
    for more in ({}, {"stream": True}, {"tools": tools}):
        answer = post(site, "/v1/chat/completions", chat | more)
        assert answer.status_code in (200, 400, 422), answer.text
    assert post(site, "/v1/responses", {"model": AGENT, "input": canaries("input")}).status_code == 200
    profile = {"agent": "canary", "segments": [{"name": "base", "text": canaries("profile")}]}
    assert post(site, "/v1/profiles", profile).status_code < 500
    file = {"file": (canaries("file's name"), canaries("file"))}
    uploaded = requests.post(
        f"{site.gateway.url}/v1/files", files=file, data={"purpose": "batch"}, headers=site.headers, timeout=SOON_S
    )
    assert uploaded.status_code < 500
    site.wait_for_event(request_id, "SUCCESS")
    check(site, canaries)


def test_calls_that_are_refused(site: Whole, canaries: Canaries) -> None:
    """What is no request, what no policy allows, and what nobody may ask."""
    vetoed = task(canaries("vetoed"), provider_hint="openrouter", has_sensitive_data=True)
    assert post(site, "/v1/tasks", vetoed).status_code == 403
    for wrong in (
        task(canaries("refused"), agent=canaries("agent")),
        task(canaries("refused"), **{canaries("field"): 1}),
        task(canaries("refused"), priority=canaries("priority")),
        task(canaries("refused"), sampling={"seed": canaries("seed")}),
        {"model": canaries("model"), "messages": [{"role": canaries("role"), "content": "x"}]},
    ):
        assert 400 <= post(site, "/v1/chat/completions" if "model" in wrong else "/v1/tasks", wrong).status_code < 500
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"title": canaries("schema")}}}
    chat = {"model": AGENT, "messages": [{"role": "user", "content": canaries("with a schema")}], "max_tokens": 4}
    assert post(site, "/v1/chat/completions", chat | {"response_format": schema}).status_code == 422
    header = {"X-MetaQore-Unknown": canaries("header")}
    assert post(site, "/v1/chat/completions", chat, **header).status_code == 422
    url = site.gateway.url
    broken = f'{{"directive": "{canaries("broken JSON")}'
    assert requests.post(f"{url}/v1/tasks", broken, headers=site.headers, timeout=SOON_S).status_code in (400, 415)
    stranger = {"Authorization": f"Bearer {canaries('unknown key')}"}
    assert requests.get(f"{url}/v1/tasks", headers=stranger, timeout=SOON_S).status_code == 401
    assert requests.get(f"{url}/v1/tasks/{canaries('id')}", headers=site.headers, timeout=SOON_S).status_code == 404
    assert requests.get(f"{url}/{canaries('path')}", timeout=SOON_S).status_code == 404
    check(site, canaries)


def test_what_is_no_http(site: Whole, canaries: Canaries) -> None:
    """Gunicorn refuses it by itself, and so writes its own lines about it."""
    for content in (
        f"{canaries('method').upper()} / HTTP/1.1\r\nHost: a\r\n\r\n",
        f"GET /healthz {canaries('version')}\r\nHost: a\r\n\r\n",
        f"GET /healthz HTTP/1.1\r\nHost: a\r\n{canaries('bad header')} : x\r\n\r\n",
        f"GET /healthz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: {canaries('coding')}\r\n\r\n",
        f"POST /v1/tasks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{canaries('chunk')}\r\n",
        f"GET /{canaries('long') * 300} HTTP/1.1\r\nHost: a\r\n\r\n",
    ):
        assert re.match(rb"HTTP/1.1 [45]\d\d ", raw(site, content.encode()))
    check(site, canaries)


def test_an_engine_that_fails(site: Whole, canaries: Canaries) -> None:
    """At the only attempt that there is."""
    failing = task(canaries("failed at"), sampling={"seed": FAILS, "max_tokens": 4})
    request_id = wait_for(site, post(site, "/v1/tasks", failing), "dead")
    site.wait_for_event(request_id, "FAILURE")
    check(site, canaries)


def test_a_worker_that_is_killed(site: Whole, canaries: Canaries) -> None:
    """In the middle of its answer."""
    killing = post(site, "/v1/tasks", task(canaries("killed at"), sampling={"seed": KILLS, "max_tokens": 4}))
    assert site.worker.process.wait(SOON_S) == -signal.SIGKILL
    site.restart_worker()
    wait_for(site, killing, "dead")
    check(site, canaries)


def test_a_database_that_is_locked(site: Whole, canaries: Canaries) -> None:
    """For longer than anybody waits."""
    with closing(sqlite3.connect(site.database, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert post(site, "/v1/tasks", task(canaries("not recorded"))).status_code == 503
    check(site, canaries)


def test_messages_that_nobody_wrote(site: Whole, canaries: Canaries) -> None:
    """Of whoever has Redis in their hands, and so not in Redis's own monitor: each is set aside, and said to be."""
    keys, secret = QueueKeys("metaqore:"), canaries("forged message")
    forged = {"body": secret, "headers": {"task": secret, "id": secret}, "properties": {"delivery_tag": secret}}
    with redis.Redis.from_url(site.redis_url) as client:
        before = client.llen(keys.named("refused"))
        for number, content in enumerate((secret, json.dumps(forged))):
            Scripts(client, keys).run("put", "ab", f"{secret}{number}", "default", 1, 0, content)
        wait_until(lambda: client.llen(keys.named("refused")) >= before + 2, SOON_S, "both to be set aside")
    assert b"set aside" in (site.folder / "worker.log").read_bytes()
    check(site, canaries)


def test_crash_dumps(site: Whole, canaries: Canaries) -> None:
    """Of a gateway and a worker that crash with requests in hand: where each thread was, and nothing else."""
    chat = task(canaries("in hand"), sampling={"seed": 1, "max_tokens": 500})
    running = [post(site, "/v1/tasks", chat).json()["id"] for _ in range(2)]
    wait_until(lambda: state_of(site, running[0]) == "running", 3 * SOON_S, "it to run")
    (server,) = psutil.Process(site.gateway.process.pid).children()
    # gunicorn has a use of its own for SIGABRT.
    server.send_signal(signal.SIGSEGV)
    site.worker.end(signal.SIGABRT)
    for log, crash in (("gateway", b"Segmentation fault"), ("worker", b"Aborted")):
        wait_until(partial(dumped, site.folder / f"{log}.log", crash), SOON_S, "a dump")
    site.restart_worker()
    check(site, canaries)


def dumped(log: Path, crash: bytes) -> bool:
    """Tell whether a log ends with where each thread was."""
    return b"Fatal Python error: " + crash in log.read_bytes()


def test_no_core_is_dumped(site: Whole) -> None:
    """Neither to a file nor to a program: there is no room for one, and nothing would be in it."""
    processes = [psutil.Process(site.gateway.process.pid), *site.worker.family(), *site.housekeeper.family()]
    processes += psutil.Process(site.gateway.process.pid).children()
    for process in [*processes, *site.flower.family()]:
        assert process.rlimit(psutil.RLIMIT_CORE)[0] == 0
        assert int(Path(f"/proc/{process.pid}/coredump_filter").read_text(), 16) == 0


def test_a_leak_is_found_in_each_place(site: Whole, canaries: Canaries) -> None:
    """What is planted in each of them turns up there: they are read, and read whole."""
    secret = canaries("planted")
    for name in ("worker", "housekeeper", "flower"):
        process = getattr(site, name).process
        with Path(f"/proc/{process.pid}/fd/2").open("a") as output:
            output.write(secret + "\n")
    with (site.folder / "gateway.log").open("a") as log:
        log.write(secret + "\n")
    with redis.Redis.from_url(site.redis_url) as client:
        client.echo(secret)
    requests.post(f"{site.collector.url}/v1/traces", data=_span(secret), timeout=SOON_S)
    app = Celery(broker=site.redis_url)
    app.conf.broker_transport_options = {"global_keyprefix": "metaqore:"}
    with app.connection_for_write() as connection, app.events.Dispatcher(connection, hostname=secret) as events:
        events.send("task-received", uuid=secret, name=secret, args=secret, kwargs="")
    wait_until(lambda: canaries.found_in(site.flower_page("/api/tasks")), SOON_S, "Flower to show it")
    told = site.told()
    blind = {place for place, content in told.items() if not canaries.found_in(content)}
    # Nobody can put anything into these from outside: that they are read shows in what they always hold.
    known = {"gateway's metrics": b"metaqore_", "worker's metrics": b"metaqore_", "housekeeper's metrics": b"metaqore_"}
    assert all(word in told[place] for place, word in known.items())
    assert blind <= {*known, "Flower's /broker", "Flower's /api/queues/length", "Flower's /api/workers?refresh=1"} | {
        "Flower's /tasks"
    }


def _span(secret: str) -> bytes:
    """Return a span as an exporter sends it, with an attribute."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest()
    resource = request.resource_spans.add()
    resource.resource.attributes.add(key="service.name").value.string_value = "planted"
    resource.scope_spans.add().spans.add(name="planted").attributes.add(key="a").value.string_value = secret
    return bytes(request.SerializeToString())
