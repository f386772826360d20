"""What a gateway tells, and that it tells it whatever is away."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import redis
import requests
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from gateway_app import build
from gateway_app.metrics import queue as module
from gateway_app.metrics.queue import QueueReadings
from tasks.metrics import gateway as metrics
from tasks.queueing.connecting import connect
from tasks.queueing.keys import QueueKeys
from tasks.queueing.publisher import Limits
from tasks.settings import PREFIX, settings
from tests.services import RedisServer, free_port, wait_until
from tests.serving import serve
from tests.websocket_client import WebSocketClient

TASK = {"agent": "incident-responder", "directive": "What now?", "sampling": {"max_tokens": 8}}
Told = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def database_kind() -> str:
    """Return SQLite: what a database is like is no matter here."""
    return "sqlite"


def parsed(text: str) -> Told:
    """Return the samples of an exposition, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for metric in text_string_to_metric_families(text)
        for sample in metric.samples
    }


def told(client: FlaskClient) -> Told:
    """Return what the gateway tells now."""
    answer = client.get("/metrics")
    assert (answer.status_code, answer.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return parsed(answer.text)


def value(samples: Told, name: str, **labels: str) -> float | None:
    """Return one sample's value."""
    return samples.get((name, frozenset(labels.items())))


def grown(before: Told, after: Told, name: str, **labels: str) -> float:
    """Return by how much a sample has grown."""
    return (value(after, name, **labels) or 0) - (value(before, name, **labels) or 0)


def test_requests_are_counted_by_route(client: FlaskClient) -> None:
    """By the template that a path matched, with method and status; what matched none is one series."""
    before = told(client)
    path = client.post("/v1/tasks", json=TASK).json["links"]["self"]
    client.get(path)
    client.get("/v1/tasks/nothing")
    client.get("/nowhere/at-all")
    client.open("/v1/tasks", method="BREW")
    client.delete("/v1/models")
    after = told(client)
    counted = {
        ("POST", "/v1/tasks", "202"): 1,
        ("GET", "/v1/tasks/{request_id}", "200"): 1,
        ("GET", "/v1/tasks/{request_id}", "404"): 1,
        ("GET", "unmatched", "404"): 1,
        ("other", "unmatched", "405"): 1,
        ("DELETE", "unmatched", "405"): 1,
        ("GET", "/metrics", "200"): 1,
    }
    for (method, route, status), count in counted.items():
        labels = {"method": method, "route": route, "status": status}
        assert grown(before, after, "metaqore_http_requests_total", **labels) == count, labels
    times = {"method": "GET", "route": "/v1/tasks/{request_id}"}
    assert grown(before, after, "metaqore_http_request_seconds_count", **times) == 2
    assert grown(before, after, "metaqore_http_errors_total", code="not_found") == 2
    assert grown(before, after, "metaqore_http_errors_total", code="method_not_allowed") == 2
    assert value(after, "metaqore_http_requests_in_progress") == 1  # The scrape itself.


def test_a_bug_is_counted(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody expected is an internal error, and leaves no request in progress."""
    before = told(client)
    monkeypatch.setattr("gateway_app.api.health.somebody_leads", lambda *_: 1 / 0)
    assert client.get("/readyz").status_code == 500
    after = told(client)
    assert grown(before, after, "metaqore_http_errors_total", code="internal_error") == 1
    labels = {"method": "GET", "route": "/readyz", "status": "500"}
    assert grown(before, after, "metaqore_http_requests_total", **labels) == 1
    assert value(after, "metaqore_http_requests_in_progress") == 1


def test_the_queue_is_told(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """By priority, with the oldest, the tokens, the limits, workers and housekeeper."""
    monkeypatch.setattr(module, "KEPT_S", 0.0)
    for priority in ("high", "high", "low"):
        client.post("/v1/tasks", json=TASK | {"priority": priority})
    after = told(client)
    assert value(after, "metaqore_queue_up") == 1
    waiting = {p: value(after, "metaqore_queue_requests", priority=p) for p in ("high", "normal", "low")}
    assert waiting == {"high": 2, "normal": 0, "low": 1}
    oldest = {p: value(after, "metaqore_queue_oldest_seconds", priority=p) for p in ("high", "normal", "low")}
    assert (oldest["normal"], 0 < (oldest["high"] or 0) < 60, 0 < (oldest["low"] or 0) < 60) == (0, True, True)
    assert (value(after, "metaqore_queue_tokens") or 0) > 100
    assert value(after, "metaqore_queue_limit", what="requests") == settings().scheduling.max_waiting
    assert value(after, "metaqore_workers", state="ready") == 0
    assert value(after, "metaqore_housekeeper_leads") == 0
    assert grown({}, after, "metaqore_audit_events_total", kind="admitted", code="") >= 3


def test_sockets_and_streams_are_told(configured: None) -> None:
    """A socket is one while it is open, holds a thread, and is counted as switching protocols, without a time."""
    with serve() as served:

        def now() -> Told:
            return parsed(requests.get(f"{served.url}/metrics", timeout=30).text)

        labels = {"method": "GET", "route": "/v1/stream"}
        before = now()
        with WebSocketClient(int(served.url.rpartition(":")[2]), "/v1/stream", served.headers):
            wait_until(lambda: value(now(), "metaqore_sockets_open") == 1, 20, "an open socket")
            assert value(now(), "metaqore_http_requests_in_progress") == 2
        wait_until(lambda: value(now(), "metaqore_sockets_open") == 0, 20, "a closed socket")
        counted = wait_until(
            lambda: grown(before, now(), "metaqore_http_requests_total", **labels, status="101"), 20, "its count"
        )
        assert counted == 1
        assert grown(before, now(), "metaqore_http_request_seconds_count", **labels) == 0


def test_redis_goes_away(own_redis: RedisServer, configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is told, at once, and the queue again when it is back."""
    monkeypatch.setattr(module, "KEPT_S", 0.0)
    monkeypatch.setenv("REDIS_URL", own_redis.url)
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        client = app.test_client()
        assert value(told(client), "metaqore_queue_up") == 1
        own_redis.kill()
        after = told(client)
        assert value(after, "metaqore_queue_up") == 0
        assert value(after, "metaqore_queue_tokens") is None
        assert value(after, "metaqore_queue_limit", what="requests") == settings().scheduling.max_waiting
        assert value(after, "metaqore_database_pool_size") == settings().database.pool_size
        own_redis.start()
        wait_until(lambda: value(told(client), "metaqore_queue_up") == 1, 20, "the queue")


def test_a_database_that_is_away(configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is told asks it."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        client = app.test_client()
        assert client.post("/v1/tasks", json=TASK, headers={"Authorization": "Bearer mq_x"}).status_code in (401, 503)
        assert value(told(client), "metaqore_database_pool_connections", state="in_use") is not None


def test_a_port_of_its_own(configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the gateway's own port tells nothing; and 0 is nowhere."""
    port = free_port()
    monkeypatch.setenv(f"{PREFIX}METRICS__GATEWAY_PORT", str(port))
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        assert app.test_client().get("/metrics").status_code == 404
        assert "metaqore_build_info" in requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30)
    monkeypatch.setenv(f"{PREFIX}METRICS__GATEWAY_PORT", "0")
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        assert app.test_client().get("/metrics").status_code == 404


@pytest.fixture
def silent() -> Iterator[str]:
    """Return the URL of a Redis that takes connections and never says anything."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"


def test_a_redis_that_hangs(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is answered all the same, and so are all others who ask meanwhile, over one connection."""
    monkeypatch.setattr(module, "PATIENCE_S", 0.2)
    made = []

    def connecting() -> redis.Redis:
        made.append(connect(silent, 1.0, 1))
        return made[0]

    readings = QueueReadings(connecting, QueueKeys("x:"), Limits())
    answers: list[list[str]] = []

    def ask() -> None:
        answers.append([f"{metric.name} {metric.samples[0].value}" for metric in readings.collect() if metric.samples])

    began = time.monotonic()
    askers = [threading.Thread(target=ask) for _ in range(5)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert time.monotonic() - began < 5
    readings.close()
    assert answers == [["metaqore_queue_up 0.0"]] * 5
    assert len(made) == 1


def test_scrapers_do_not_load_redis(redis_url: str) -> None:
    """What was heard is told again for a while, however many ask."""
    readings = QueueReadings(lambda: connect(redis_url, 5.0, 1), QueueKeys("x:"), Limits())
    with redis.Redis.from_url(redis_url) as client:
        client.config_resetstat()
        for _ in range(20):
            assert [m.samples[0].value for m in readings.collect() if m.name == metrics.QUEUE_UP.name] == [1]
        # Once for the ages of what waits, and once for those of the workers' reports.
        assert client.info("commandstats")["cmdstat_time"]["calls"] == 2
    readings.close()
