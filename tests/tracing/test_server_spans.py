"""The spans of HTTP requests, in one process with a worker that is played."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flask.testing import FlaskClient

from gateway_app import build
from tasks import tracing
from tasks.errors import DatabaseUnavailable
from tasks.settings import PREFIX, settings
from tests.collector import Collector, Received, collecting
from tests.conftest import new_key
from tests.played_worker import TASK, PlayedWorker, result

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = {"traceparent": f"00-{TRACE}-{CALLER}-01"}

pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Return a collector that this process's variables name."""
    with collecting() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


@contextmanager
def traced_client() -> Iterator[FlaskClient]:
    """Return a client of a gateway that records; at the end all is sent."""
    settings.cache_clear()
    app = build(settings())
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
    with app.extensions["closing"]:
        yield client
    assert not tracing.is_on()


def only(collector: Collector, name: str) -> Received:
    """Return the one span of this name."""
    (found,) = (span for span in collector.spans if span.name == name)
    return found


@pytest.mark.usefixtures("configured")
def test_a_client_whose_context_is_not_wanted(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace begins here, whatever the client names."""
    monkeypatch.setenv(f"{PREFIX}TRACING__ACCEPT_CONTEXT", "false")
    with traced_client() as client:
        assert client.post("/v1/tasks", json=TASK, headers=TRACED).status_code == 202
    server = only(collector, "POST /v1/tasks")
    assert (server.parent, server.trace == TRACE) == ("", False)
    assert server.attributes["gen_ai.agent.name"] == TASK["agent"]


@pytest.mark.usefixtures("configured")
def test_a_stream_that_a_thread_serves(collector: Collector) -> None:
    """Its span ends with the stream too, and is not current in what the thread does next."""
    with traced_client() as client:
        worker = PlayedWorker(client)
        request_id = worker.submit()
        worker.answer(request_id, worker.start(request_id), result("one", "two"))
        response = client.get(f"/v1/tasks/{request_id}/events", headers=TRACED, buffered=False)
        assert tracing.current() is tracing.UNRECORDED
        text = response.get_data()
        read_at = collector.spans[-1].ended if collector.spans else 0
        response.close()
        assert b"completed" in text
        worker.close()
    server = only(collector, "GET /v1/tasks/<request_id>/events")
    assert (server.trace, server.parent, server.attributes["metaqore.request.id"]) == (TRACE, CALLER, request_id)
    assert server.links == [only(collector, "POST /v1/tasks").trace]
    assert server.ended >= read_at


@pytest.mark.usefixtures("configured")
def test_what_fails_and_what_is_not_traced(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the gateway's is a failure, by its code; one of the client's is none; probes are not there."""
    with traced_client() as client:
        for path in ("/healthz", "/readyz", "/nowhere"):
            client.get(path)

        def away(*_arguments: object) -> None:
            raise DatabaseUnavailable("a text that says too much")

        monkeypatch.setattr("gateway_app.pipeline.commit", away)
        assert client.post("/v1/tasks", json=TASK).status_code == 503
    assert not {"GET /healthz", "GET /readyz"} & {span.name for span in collector.spans}
    assert not only(collector, "GET").failed
    assert only(collector, "GET").attributes["metaqore.error.code"] == "not_found"
    for name in ("POST /v1/tasks", "commit"):
        failed = only(collector, name)
        assert (failed.failed, failed.attributes["error.type"]) == (True, "database_unavailable")
    assert not any(b"says too much" in body for body in collector.bodies)
