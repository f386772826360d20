"""A request's whole journey over real services: HTTP, governance, SQL, Redis, a Celery worker, and the stream back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient

from tasks.db import Database
from tasks.schema import audit_events
from tasks.settings import PREFIX, settings
from tests.services import wait_until
from tests.workers import Worker

AGENT = "incident-responder"
CANARY = "canary-7c1f-the-disk-of-db-1-is-full"
READY_S = 120


@pytest.fixture
def worker(configured: None, tmp_path: Path) -> Iterator[Worker]:
    """Return a worker that a test may start, kill and start again."""
    worker = Worker(tmp_path / "worker.log")
    try:
        yield worker
    finally:
        worker.stop()


def test_no_word_of_a_prompt_is_stored_in_the_open(
    client: FlaskClient, worker: Worker, redis_url: str, migrated_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither Redis, as its own monitor sees it, nor the database, nor a log holds the directive or the answer."""
    seen: list[str] = []
    monitored = threading.Event()

    def monitor() -> None:
        with redis.Redis.from_url(redis_url).monitor() as commands:  # type: ignore[no-untyped-call]
            monitored.set()
            for command in commands.listen():
                seen.append(str(command["command"]))
                if "enough-seen" in seen[-1]:
                    return

    watcher = threading.Thread(target=monitor, daemon=True)
    watcher.start()
    monitored.wait(10)
    start(worker, client)
    done = run(client, directive=CANARY, context={"canary": CANARY})
    redis.Redis.from_url(redis_url).echo("enough-seen")
    watcher.join(10)
    assert any(done["id"] in command for command in seen), "the monitor saw nothing"
    answer = done["result"]["text"].strip()
    for where, text in (
        ("redis", "\n".join(seen)),
        ("log", worker.log.read_text() + caplog.text),
        ("database", dump(migrated_url)),
    ):
        assert CANARY not in text, where
        assert answer not in text, where


def test_a_killed_worker_loses_nothing(client: FlaskClient, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kill -9` in the middle of an answer: another attempt begins with `reset`, and its text is the whole answer."""
    monkeypatch.setenv(f"{PREFIX}SCHEDULING__LEASE_S", "2")
    monkeypatch.setenv(f"{PREFIX}ENGINE__OPTIONS", json.dumps({"time_scale": 20}))
    start(worker, client)
    accepted = submit(client, sampling={"max_tokens": 30, "seed": 7})
    wait_until(lambda: "started" in kinds(accepted["id"]), 20, "the first attempt")
    worker.kill()
    monkeypatch.setenv(f"{PREFIX}ENGINE__OPTIONS", "{}")
    worker.start()
    frames = stream(client, accepted)
    assert "reset" in [frame["event"] for frame in frames]
    assert frames[-1]["event"] == "completed"
    assert kinds(accepted["id"]) == ["received", "admitted", "started", "started", "completed"]
    polled = client.get(accepted["links"]["self"]).json
    assert polled["result"]["text"] == last_text(frames)
    assert polled["attempt"] == 2


def start(worker: Worker, client: FlaskClient) -> None:
    """Start a worker and wait until it takes requests."""
    worker.start()
    wait_until(lambda: "worker" not in client.get("/readyz").json["missing"], READY_S, "a ready worker")


def submit(client: FlaskClient, **task: Any) -> dict[str, Any]:
    """Submit a task; return the answer."""
    body = {"agent": AGENT, "directive": "What now?", "sampling": {"max_tokens": 12}, **task}
    accepted = client.post("/v1/tasks", json=body)
    assert accepted.status_code == 202, accepted.text
    answer: dict[str, Any] = accepted.get_json()
    return answer


def run(client: FlaskClient, **task: Any) -> dict[str, Any]:
    """Run a task to its end; return it as polled, once its stream has been checked against it."""
    accepted = submit(client, **task)
    frames = stream(client, accepted)
    assert [frames[0]["event"], frames[-1]["event"]] == ["started", "completed"], frames[-1]
    polled: dict[str, Any] = client.get(accepted["links"]["self"]).get_json()
    assert (polled["status"], polled["result"]["text"]) == ("completed", last_text(frames))
    return polled


def stream(client: FlaskClient, accepted: dict[str, Any]) -> list[dict[str, Any]]:
    """Watch a task to its end; return its frames."""
    text = client.get(accepted["links"]["events"]).text
    blocks = [block.splitlines() for block in text.split("\n\n") if block and not block.startswith(":")]
    lines = [dict(line.split(": ", 1) for line in block) for block in blocks]
    return [{"id": item["id"], "event": item["event"], "data": json.loads(item["data"])} for item in lines]


def last_text(frames: list[dict[str, Any]]) -> str:
    """Return the text of the last attempt, as a client that obeys `reset` has it."""
    text = ""
    for frame in frames:
        text = "" if frame["event"] == "reset" else text + frame["data"].get("text", "")
    return text


def kinds(request_id: str) -> list[str]:
    """Return the kinds of a request's audit events, in the order they happened."""
    order = ["received", "admitted", "started", "completed", "failed"]
    query = sa.select(audit_events.c.kind).where(audit_events.c.request_id == request_id)
    database = Database(settings().database)
    try:
        return sorted(database.read(lambda connection: connection.execute(query).scalars().all()), key=order.index)
    finally:
        database.close()


def dump(migrated_url: str) -> str:
    """Return everything that is stored in the database, as text."""
    engine = sa.create_engine(migrated_url)
    with engine.connect() as connection:
        tables = sa.inspect(connection).get_table_names()
        rows = [row for table in tables for row in connection.execute(sa.text(f"SELECT * FROM {table}"))]
    engine.dispose()
    return "\n".join(str([bytes(value) if isinstance(value, memoryview) else value for value in row]) for row in rows)
