"""Redis or the database away: 503 with Retry-After, nothing half done, and back to work unaided."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient
from sqlalchemy.engine import make_url

from gateway_app import build
from tasks.db import Database
from tasks.errors import QueueUnavailable
from tasks.queueing.keys import QueueKeys
from tasks.queueing.publisher import Publisher
from tasks.schema import requests
from tasks.settings import PREFIX, settings
from tests.services import PostgresServer, RedisServer, wait_until

#: Shorter than the default, so that a test of a locked database ends soon.
TIMEOUT_S = "1"
TASK = {"agent": "incident-responder", "directive": "What now?"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, secrets_directory: Path) -> None:
    """Let the gateway wait a second for its database."""
    monkeypatch.setenv(f"{PREFIX}DATABASE__TIMEOUT_S", TIMEOUT_S)


@pytest.fixture
def postgres_server() -> Iterator[PostgresServer]:
    """Give each test here a PostgreSQL of its own, to be stopped."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def redis_url(own_redis: RedisServer) -> str:
    """Give each test here a Redis of its own, to be killed."""
    return own_redis.url


def test_redis_away(client: FlaskClient, own_redis: RedisServer) -> None:
    """Refused with 503 and recorded as failed; taken again as soon as Redis is back."""
    assert client.post("/v1/tasks", json=TASK).status_code == 202
    own_redis.kill()
    answer = client.post("/v1/tasks", json=TASK)
    assert (answer.status_code, answer.json["code"]) == (503, "queue_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json["retryable"] is True
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json["status"], "queue" in ready.json["missing"]) == (503, "unavailable", True)
    assert states() == ["queued"]
    own_redis.start()
    assert client.post("/v1/tasks", json=TASK).status_code == 202
    assert messages(own_redis.url) == 2


def test_redis_lost_between_commit_and_publish(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The admitted request is recorded as failed, so that no id is left without an end."""

    def lost(*_args: Any) -> None:
        raise QueueUnavailable

    monkeypatch.setattr(Publisher, "publish", lost)
    answer = client.post("/v1/tasks", json=TASK)
    assert (answer.status_code, answer.json["code"]) == (503, "queue_unavailable")
    task = client.get(f"/v1/tasks/{answer.json['request_id']}").json
    assert (task["status"], task["error"]["code"]) == ("failed", "queue_unavailable")
    events = client.get(task["links"]["events"])
    assert "event: failed" in events.text


def test_what_waits_can_be_cancelled_without_redis(client: FlaskClient, own_redis: RedisServer) -> None:
    """The database decides. And whoever asks again with the same key hears that the request was taken."""
    key = {"Idempotency-Key": "once"}
    accepted = [client.post("/v1/tasks", json=TASK, headers=headers).get_json() for headers in (key, {})]
    own_redis.kill()
    again = client.post("/v1/tasks", json=TASK, headers=key)
    assert (again.status_code, again.json["id"]) == (202, accepted[0]["id"])
    for task in accepted:
        answer = client.delete(task["links"]["self"])
        assert (answer.status_code, answer.json["status"]) == (200, "cancelled")
        assert "event: cancelled" in client.get(task["links"]["events"]).text
    assert states() == ["cancelled"] * 2
    own_redis.start()
    assert client.post("/v1/tasks", json=TASK).status_code == 202


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_full_queue(
    client: FlaskClient, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Refused with 429 and recorded, whether it is seen before the request is stored or only in the last moment; what is
    in the queue stays, and its client may cancel it, which makes no room: its message is taken off by a worker.
    """
    monkeypatch.setenv(f"{PREFIX}SCHEDULING__MAX_WAITING", "2")
    settings.cache_clear()
    app = build(settings())
    full = app.test_client()
    full.environ_base["HTTP_AUTHORIZATION"] = client.environ_base["HTTP_AUTHORIZATION"]
    with app.extensions["closing"]:
        accepted = [full.post("/v1/tasks", json=TASK) for _ in range(2)]
        assert [answer.status_code for answer in accepted] == [202, 202]
        if moment == "after":
            monkeypatch.setattr(Publisher, "check", lambda _self: None)
        answer = full.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "once"})
        assert (answer.status_code, answer.json["code"], answer.json["retryable"]) == (429, "queue_full", True)
        assert int(answer.headers["Retry-After"]) > 0
        assert messages(own_redis.url) == 2
        assert sorted(states()) == (["queued", "queued"] if moment == "before" else ["failed", "queued", "queued"])
        with redis.Redis.from_url(own_redis.url) as queue:
            queue.decr(QueueKeys(settings().gateway.key_prefix).waiting)
        assert full.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "once"}).status_code == 202


def test_cancelling_while_the_database_is_away(
    client: FlaskClient, migrated_url: str, request: pytest.FixtureRequest
) -> None:
    """503, and nothing has changed; it works as soon as the database is back."""
    postgres = request.getfixturevalue("postgres_server") if migrated_url.startswith("postgresql") else None
    accepted = client.post("/v1/tasks", json=TASK).get_json()
    path = accepted["links"]["self"]
    with away(migrated_url, postgres):
        answer = client.delete(path)
        assert (answer.status_code, answer.json["code"]) == (503, "database_unavailable")
    wait_until(lambda: client.delete(path).status_code == 200, 20, "the database to be used again")
    assert states() == ["cancelled"]


def test_database_away(
    client: FlaskClient, own_redis: RedisServer, migrated_url: str, request: pytest.FixtureRequest
) -> None:
    """Refused with 503, and nothing is queued that is not recorded."""
    postgres = request.getfixturevalue("postgres_server") if migrated_url.startswith("postgresql") else None
    assert client.post("/v1/tasks", json=TASK).status_code == 202
    with away(migrated_url, postgres):
        answer = client.post("/v1/tasks", json=TASK)
        assert (answer.status_code, answer.json["code"]) == (503, "database_unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        assert messages(own_redis.url) == 1
    wait_until(lambda: client.post("/v1/tasks", json=TASK).status_code == 202, 20, "the database to be used again")
    assert messages(own_redis.url) == len(states())


def test_a_database_without_tables_is_said_so(
    configured: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A gateway whose database was never migrated is not ready, and says what to do."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'empty.db'}")
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        ready = app.test_client().get("/readyz")
    assert ready.status_code == 503
    assert "flask db upgrade" in ready.json["checks"]["database"]


@contextmanager
def away(migrated_url: str, server: PostgresServer | None) -> Iterator[None]:
    """Take the database away for a while: PostgreSQL is killed, SQLite's file locked by somebody else."""
    if server is None:
        connection = sqlite3.connect(make_url(migrated_url).database or "", isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        # In WAL mode a reader still sees the last commit, which is as it should be; only writing is blocked.
        yield
        connection.execute("ROLLBACK")
        connection.close()
    else:
        server.kill()
        yield
        server.start()


def messages(url: str) -> int:
    """Return how many messages wait in the queue."""
    client = redis.Redis.from_url(url)
    return sum(client.llen(key) for key in client.scan_iter("metaqore:gpu:list:*"))


def states() -> list[str]:
    """Return the states of all stored requests."""
    database = Database(settings().database)
    try:
        return list(database.read(lambda connection: connection.execute(sa.select(requests.c.state)).scalars()))
    finally:
        database.close()
