"""The database goes away while it commits: the gateway finds out whether the request was taken before it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient
from sqlalchemy.engine import Connection

from gateway_app import build
from tasks.db import Database
from tasks.db_errors import CommitUndecided
from tasks.db_statements import Statement
from tasks.schema import audit_events, requests
from tasks.settings import PREFIX, DatabaseGroup, settings
from tests.commit_proxy import CommitProxy
from tests.conftest import new_key
from tests.services import wait_until

POSTGRESQL = pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
TASK = {"agent": "incident-responder", "directive": "What now?"}
#: Shorter than the default, so that what stays undecided is said soon.
TIMEOUT_S = 1.0


@pytest.fixture
def proxy(migrated_url: str) -> Iterator[CommitProxy]:
    """Return the proxy between gateway and database."""
    proxy = CommitProxy(migrated_url)
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(configured: None, proxy: CommitProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlaskClient]:
    """Return a client of a gateway that reaches its database through the proxy."""
    key = new_key("default")
    monkeypatch.setenv("DATABASE_URL", proxy.url)
    monkeypatch.setenv(f"{PREFIX}DATABASE__TIMEOUT_S", str(TIMEOUT_S))
    settings.cache_clear()
    app = build(settings())
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {key}"
    with app.extensions["closing"]:
        assert client.post("/v1/tasks", json=TASK).status_code == 202
        yield client


class Record:
    """What the database holds, read past the proxy, and what the queue holds."""

    def __init__(self, url: str, redis_url: str) -> None:
        self.database = Database(DatabaseGroup(url=url))
        self.redis = redis.Redis.from_url(redis_url)

    def states(self) -> list[str]:
        """Return the states of all requests, in the order they came."""
        query = sa.select(requests.c.state).order_by(requests.c.request_id)
        return self.database.read(lambda on: list(on.execute(query).scalars()))

    def kinds(self, request_id: str) -> list[str]:
        """Return the kinds of a request's events."""
        query = sa.select(audit_events.c.kind).where(audit_events.c.request_id == request_id)
        return self.database.read(lambda on: list(on.execute(query.order_by(audit_events.c.occurred_at)).scalars()))

    def messages(self) -> int:
        """Return how many messages the queue holds."""
        count: Any = self.redis.hlen("metaqore:gpu:messages")
        return int(count)


@pytest.fixture
def record(migrated_url: str, redis_url: str) -> Iterator[Record]:
    """Return the record."""
    record = Record(migrated_url, redis_url)
    yield record
    record.database.close()
    record.redis.close()


@POSTGRESQL
@pytest.mark.parametrize("arrives", [True, False])
def test_the_ambiguity(migrated_url: str, proxy: CommitProxy, record: Record, *, arrives: bool) -> None:
    """The control: both times the caller of the database hears the same, and once it is committed."""
    database = Database(DatabaseGroup(url=proxy.url, timeout_s=TIMEOUT_S))
    insert = sa.text(
        "INSERT INTO api_keys (key_id, organization, name, key_hash, created_at) VALUES ('k', 'o', 'n', '\\x00', now())"
    )
    database.write(lambda on: on.execute(sa.text("SELECT 1")) and None)
    proxy.fate = "answer lost" if arrives else "never arrives"
    with pytest.raises(CommitUndecided):
        database.write(lambda on: on.execute(insert) and None)
    count = sa.text("SELECT count(*) FROM api_keys")

    def stored() -> int:
        found: int = record.database.read(lambda on: on.execute(count).scalar_one())
        return found

    if arrives:
        wait_until(lambda: stored() == 1, 10, "the commit to be carried out")
    assert stored() == (1 if arrives else 0)
    database.close()


@POSTGRESQL
def test_a_commit_that_was_made(proxied: FlaskClient, proxy: CommitProxy, record: Record) -> None:
    """Its client hears that the request was accepted, and it is queued: once."""
    proxy.fate = "answer lost"
    answer = proxied.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "once"})
    assert answer.status_code == 202, answer.text
    assert record.kinds(answer.get_json()["id"]) == ["received", "admitted"]
    assert (record.states(), record.messages()) == (["queued"] * 2, 2)
    again = proxied.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "once"})
    assert again.get_json()["id"] == answer.get_json()["id"]


@POSTGRESQL
def test_a_commit_that_was_not_made(proxied: FlaskClient, proxy: CommitProxy, record: Record) -> None:
    """Its client hears that it was not, which is recorded; the same again is a new request."""
    proxy.fate = "never arrives"
    answer = proxied.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "once"})
    assert (answer.status_code, answer.get_json()["code"]) == (503, "database_unavailable")
    assert "was not accepted" in answer.get_json()["detail"]
    assert record.kinds(answer.get_json()["request_id"]) == ["received", "failed"]
    assert (record.states(), record.messages()) == (["queued"], 1)
    again = proxied.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "once"})
    assert again.status_code == 202
    assert (record.states(), record.messages()) == (["queued"] * 2, 2)


@POSTGRESQL
def test_a_commit_that_is_still_under_way(
    proxied: FlaskClient, proxy: CommitProxy, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking would find nothing yet. The gateway waits for it instead, and the client hears that it was accepted."""
    proxy.fate = "arrives late"

    adding = Statement.run_each

    def let_through(statement: Statement, on: Connection, events: Sequence[Mapping[str, Any]]) -> None:
        # The refusal is being recorded, on another connection.
        if proxy.fate is None:
            assert on.dialect.name == "postgresql"
            proxy.let_through.set()
        adding(statement, on, events)

    monkeypatch.setattr(Statement, "run_each", let_through)
    answer = proxied.post("/v1/tasks", json=TASK)
    assert answer.status_code == 202, answer.text
    assert record.kinds(answer.get_json()["id"]) == ["received", "admitted"]
    assert (record.states(), record.messages()) == (["queued"] * 2, 2)


@POSTGRESQL
def test_a_commit_that_nobody_can_say_anything_of(proxied: FlaskClient, proxy: CommitProxy, record: Record) -> None:
    """It is under way for longer than the gateway waits: the client hears just that, and its key finds the request."""
    proxy.fate = "arrives late"
    answer = proxied.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "once"})
    assert (answer.status_code, answer.get_json()["code"]) == (503, "database_unavailable")
    assert "may or may not have been accepted" in answer.get_json()["detail"]
    assert record.messages() == 1
    proxy.let_through.set()
    wait_until(lambda: len(record.states()) == 2, 10, "the commit to be carried out")
    again = proxied.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "once"})
    assert (again.status_code, again.get_json()["id"]) == (202, answer.get_json()["request_id"])


@SQLITE
@pytest.mark.parametrize("made", [True, False])
def test_the_answer_of_sqlite_is_lost(client: FlaskClient, record: Record, *, made: bool) -> None:
    """The same for a file: its disk fails at the commit, after it or before."""
    assert client.post("/v1/tasks", json=TASK).status_code == 202
    commits: list[Connection] = []

    def lose(connection: Connection) -> None:
        commits.append(connection)
        if len(commits) == 1:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.commit() if made else driver.rollback()
            raise sa.exc.OperationalError("COMMIT", None, OSError("disk I/O error"))

    sa.event.listen(sa.engine.Engine, "commit", lose)
    try:
        answer = client.post("/v1/tasks", json=TASK)
    finally:
        sa.event.remove(sa.engine.Engine, "commit", lose)
    assert answer.status_code == (202 if made else 503)
    assert record.states() == ["queued"] * (2 if made else 1)
    assert record.messages() == (2 if made else 1)
