"""A worker as Celery's own tools see it: its events, `celery inspect`, `celery control revoke`; each shows a request's id and
nothing else of it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from tests.services import wait_until
from tests.worker_gpu.site import Site, site
from tests.workers import ROOT, STOP_S

SOON_S = 30.0
DIRECTIVE = "xyzzy-directive"
#: An answer takes a minute, unless it is asked for less of it; and the engine fails at those with this sampling seed.
FAILS = 666
OPTIONS = {
    "tokens_per_s_per_sequence": 5,
    "answer_tokens": 300,
    "faults": [{"what": "fail", "seed": FAILS}],
}


class Events:
    """The events of tasks, by the task's id, in the order in which they came."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []

    def of(self, request_id: str) -> list[str]:
        """Return the types of a task's events."""
        return [event["type"] for event in self.received if event["uuid"] == request_id]

    def wait_for(self, request_id: str, *types: str) -> None:
        """Return once exactly these have come, the last one last.

        A request that is tried again may be received anew a moment before its first attempt is told to be over.
        """
        expected = [f"task-{name}" for name in types]
        with suppress(TimeoutError):
            wait_until(lambda: len(self.of(request_id)) >= len(expected), SOON_S, "the events")
        came = self.of(request_id)
        assert (sorted(came), came[-1:]) == (sorted(expected), expected[-1:])


@contextmanager
def listening(app: Celery) -> Iterator[Events]:
    """Collect the events of tasks, until the end of the block."""
    events, ready, ended = Events(), threading.Event(), threading.Event()

    def listen() -> None:
        with app.connection_for_read() as connection:
            receiver = app.events.Receiver(connection, handlers={"*": take})
            with receiver.consumer_context() as (consuming, *_):
                ready.set()
                while not ended.is_set():
                    try:
                        consuming.drain_events(timeout=0.2)
                    except TimeoutError:
                        continue

    def take(event: dict[str, Any]) -> None:
        if event["type"].startswith("task-"):
            events.received.append(event)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        assert ready.wait(SOON_S)
        yield events
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def made(configured: None, tmp_path: Path) -> Iterator[Site]:
    """Return a site with one worker, which sends events."""
    with site(tmp_path) as found:
        settings = {"SCHEDULING__DRAIN_S": "0", "SCHEDULING__MAX_ATTEMPTS": "2", "SCHEDULING__RETRY_FIRST_S": "0"}
        found.start("gpu", options=OPTIONS, FLOWER__EVENTS="true", **settings)
        found.wait_until_ready("gpu")
        yield found


def celery(*command: str) -> str:
    """Return what a command of Celery's prints, in JSON."""
    program = [sys.executable, "-m", "celery", *command, "--json"]
    ran = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=STOP_S, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_watched_worker(made: Site) -> None:
    """What becomes of each request, in the words that Celery has for it, also of what ends while the worker drains."""
    with listening(made.celery) as events:
        short = made.submit(DIRECTIVE, max_tokens=2)
        events.wait_for(short, "received", "started", "succeeded")
        failing = made.submit(DIRECTIVE, seed=FAILS)
        events.wait_for(failing, "received", "started", "retried", "received", "started", "failed")
        late = made.submit(DIRECTIVE)
        # Celery's own clients cancel by the same id.
        check_inspection(made, late)
        made.celery.control.revoke(late, terminate=True)
        events.wait_for(late, "received", "started", "revoked")
        made.check_ends([late], "cancelled")
        drained = made.submit(DIRECTIVE)
        events.wait_for(drained, "received", "started")
        (worker,) = made.started
        worker.send(signal.SIGTERM)
        worker.wait()
        events.wait_for(drained, "received", "started", "retried")
    assert DIRECTIVE not in json.dumps(events.received, default=str)
    for event in events.received:
        told = {name for name, value in event.items() if value and name not in EVERY_EVENT}
        assert told <= {"name", "args", "kwargs", "runtime"}
        assert event.get("args", event["uuid"]) == event["uuid"]


EVERY_EVENT = {"type", "uuid", "hostname", "timestamp", "local_received", "utcoffset", "clock", "pid"}


def check_inspection(made: Site, running: str) -> None:
    """Check what the four questions that operators ask most show of a worker that runs one request."""
    wait_until(lambda: made.rows(running)[0].state == "running", SOON_S, "it to run")
    inspect = made.celery.control.inspect(["gpu@test"], timeout=SOON_S, limit=1)
    (active,) = inspect.active()["gpu@test"]
    assert (active["id"], active["name"], active["args"]) == (running, "metaqore.generate", [])
    assert inspect.reserved()["gpu@test"] == []
    stats = inspect.stats()["gpu@test"]
    assert stats["total"] == {"metaqore.generate": 4}, "one that ended, one that failed twice, and this one"
    assert [queue["name"] for queue in inspect.active_queues()["gpu@test"]] == ["gpu"]
    printed = celery("inspect", "active", "--destination", "gpu@test")
    assert running in printed
    assert DIRECTIVE not in printed + json.dumps([active, stats], default=str)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_revoke_from_the_command_line(made: Site) -> None:
    """It cancels."""
    running = made.submit(DIRECTIVE)
    made.wait_for_states([running], "running")
    assert "cancelling 1 requests" in celery("control", "revoke", running)
    made.check_ends([running], "cancelled")
