"""A request's whole journey over real services: HTTP, governance, SQL, Redis, a Celery worker, and the stream back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from tasks.db import Database
from tasks.schema import audit_events
from tasks.settings import settings
from tests.services import wait_until

ROOT = Path(__file__).parents[1]


@pytest.fixture
def worker(client: FlaskClient, tmp_path: Path) -> Iterator[None]:
    """Run a worker, as an operator would start one, until the test ends."""
    command = [sys.executable, "-m", "celery", "worker", "-Q", "gpu", "--loglevel", "INFO"]
    with (tmp_path / "worker.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=dict(os.environ))  # noqa: S603
    try:
        wait_until(lambda: client.get("/readyz").json["status"] == "ready", 60, "a ready worker")
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.usefixtures("worker")
def test_a_task_is_answered_streamed_and_recorded(client: FlaskClient) -> None:
    """One task: 202, frames, the same text when polled, and its audit events in order."""
    task = {"agent": "incident-responder", "directive": "What now?", "sampling": {"max_tokens": 12}}
    accepted = client.post("/v1/tasks", json=task)
    assert accepted.status_code == 202, accepted.text
    frames = _frames(client.get(accepted.json["links"]["events"]).text)
    assert [frames[0]["event"], frames[-1]["event"]] == ["started", "completed"]
    text = "".join(frame["data"]["text"] for frame in frames if frame["event"] == "delta")
    polled = client.get(accepted.json["links"]["self"]).json
    assert (polled["status"], polled["result"]["text"]) == ("completed", text)
    assert polled["result"]["usage"]["output_tokens"] == 12
    query = sa.select(audit_events.c.kind).where(audit_events.c.request_id == accepted.json["id"])
    kinds = Database(settings().database).read(lambda connection: set(connection.execute(query).scalars()))
    assert kinds == {"received", "admitted", "started", "completed"}


def _frames(text: str) -> list[dict[str, object]]:
    blocks = [block.splitlines() for block in text.split("\n\n") if block and not block.startswith(":")]
    lines = [dict(line.split(": ", 1) for line in block) for block in blocks]
    return [{"id": item["id"], "event": item["event"], "data": json.loads(item["data"])} for item in lines]
