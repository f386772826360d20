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

from gateway_app import build
from gateway_app.governance.api_keys import ApiKeys
from tasks.db import Database, upgrade
from tasks.schema import audit_events
from tasks.settings import PREFIX, settings
from tests.services import wait_until
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny checkpoint."""
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def client(
    redis_url: str, database_url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FlaskClient]:
    """Return an authenticated client of a gateway with one worker on the simulated engine."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv(f"{PREFIX}ENGINE__KIND", "simulated")
    monkeypatch.setenv(f"{PREFIX}ENGINE__MODEL", str(tiny_model))
    monkeypatch.setenv(f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY", str(ROOT / "profiles"))
    settings.cache_clear()
    upgrade(database_url)
    app = build(settings())
    _, key = ApiKeys(Database(settings().database), settings().secrets.keys("key_pepper")).create("default", "test")
    command = [sys.executable, "-m", "celery", "worker", "-Q", "gpu", "--loglevel", "INFO"]
    with (tmp_path / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=dict(os.environ))  # noqa: S603
    try:
        client = app.test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
        wait_until(lambda: client.get("/readyz").json["status"] == "ready", 60, "a ready worker")
        yield client
    finally:
        worker.terminate()
        worker.wait(30)


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
