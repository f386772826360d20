"""Processes whose spans go to one collector, and what looks for spans in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.collector import Collector, Received, collecting
from tests.conftest import new_key
from tests.fleet import READY_S, Gateway, own_services
from tests.housekeepers import HousekeeperProcess
from tests.services import wait_until
from tests.workers import Worker

SOON_S = 60.0
CANARY = "kanarienvogel-4711"
SETTINGS = {
    "SCHEDULING__LEASE_S": "2",
    "SCHEDULING__RETRY_FIRST_S": "0.1",
    # Slow enough that there is time to kill a worker in the middle of an answer.
    "ENGINE__OPTIONS": '{"tokens_per_s_per_sequence": 40, "answer_tokens": 60, "faults": [{"what": "fail", "seed": 666}]}',
}


class Site:
    """The processes, and what sends them requests."""

    def __init__(self, collector: Collector, environment: dict[str, str], folder: Path, key: str) -> None:
        self.collector = collector
        self.environment = environment
        self.headers = {"Authorization": f"Bearer {key}"}
        self.worker = Worker(folder / "worker.log", **environment)
        self.gateway = Gateway(folder / "gateway.log", os.environ | environment)

    def chat(self, **more: Any) -> dict[str, Any]:
        """Return the body of a request that takes a moment to be answered."""
        said = {"role": "user", "content": f"{CANARY}: what is the matter?"}
        return {"model": "incident-responder", "messages": [said], "max_tokens": 4, **more}

    def post(self, path: str, body: dict[str, Any], stream: bool = False, **headers: str) -> requests.Response:
        """Send a request."""
        url = f"{self.gateway.url}{path}"
        return requests.post(url, json=body, headers=self.headers | headers, timeout=SOON_S, stream=stream)

    def submit(self, **more: Any) -> str:
        """Submit a task; return its id."""
        body = {"agent": "incident-responder", "directive": CANARY, "sampling": {"max_tokens": 4}, **more}
        answer = self.post("/v1/tasks", body)
        assert answer.status_code == 202, answer.text
        request_id: str = answer.json()["id"]
        return request_id

    def trace_of(self, request_id: str) -> str:
        """Return the trace in which the request was accepted."""
        return self.collector.wait(lambda spans: [span for span in spans if is_post_of(span, request_id)])[0].trace

    def whole(self, trace: str) -> list[Received]:
        """Return the spans of a trace of which a worker has told the end."""
        self.collector.wait(named("process gpu", outcome="completed"), trace)
        return self.collector.of(trace)


def is_post_of(span: Received, request_id: str) -> bool:
    """Tell whether the span is of the call that sent the request."""
    return (
        span.kind == "SERVER" and span.name.startswith("POST") and span.attributes["metaqore.request.id"] == request_id
    )


def named(name: str, **attributes: Any) -> Callable[[list[Received]], list[Received]]:
    """Return what picks the spans that have this name, and these attributes of ours."""
    wanted = {f"metaqore.{key}": value for key, value in attributes.items()}
    return lambda spans: [s for s in spans if s.name == name and wanted.items() <= s.attributes.items()]


def one(spans: list[Received], name: str, **attributes: Any) -> Received:
    """Return the one span that has this name, and these attributes of ours."""
    (found,) = named(name, **attributes)(spans)
    return found


@contextmanager
def traced_site(folder: Path, model: Path) -> Iterator[Site]:
    """Return a gateway, a worker and a housekeeper that all send their spans to one collector."""
    with ExitStack() as stack:
        collector = stack.enter_context(collecting())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in collector.environment.items():
            patch.setenv(name, value)
        environment = stack.enter_context(own_services(folder, model, **SETTINGS)) | collector.environment
        made = Site(collector, environment, folder, new_key("acme"))
        stack.callback(made.gateway.kill)
        stack.callback(made.worker.stop)
        made.worker.start()
        housekeeper = HousekeeperProcess(folder / "housekeeper.log")
        stack.callback(housekeeper.stop)
        wait_until(made.gateway.ready, READY_S, "a ready gateway")
        yield made
