"""The database away, full or read-only: 503 with Retry-After, what was accepted is kept, and back to work unaided."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient
from sqlalchemy.engine import Connection, make_url

from gateway_app import build
from tasks.db import Database
from tasks.schema import audit_events, requests
from tasks.settings import PREFIX, settings
from tests.services import PostgresServer, wait_until

#: Shorter than the default, so that a test of a locked database ends soon.
TIMEOUT_S = "1"
BACK_S = 20.0
LISTENERS: list[Callable[[Connection], None]] = []
TASK = {"agent": "incident-responder", "directive": "What now?"}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, secrets_directory: Path) -> None:
    """Let the gateway wait a second for its database."""
    monkeypatch.setenv(f"{PREFIX}DATABASE__TIMEOUT_S", TIMEOUT_S)


@pytest.fixture(autouse=True)
def unheard() -> Iterator[None]:
    """Take away at the test's end what `pragma` had called whenever a connection begins something."""
    yield
    while LISTENERS:
        sa.event.remove(sa.engine.Engine, "begin", LISTENERS.pop())


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[PostgresServer]:
    """Give this module a PostgreSQL of its own, to be killed."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("state", ["away", "full", "read-only"])
def test_an_outage(client: FlaskClient, migrated_url: str, request: pytest.FixtureRequest, state: str) -> None:
    """New work and cancelling are refused, nothing is queued that is not recorded, and all goes on afterwards."""
    accepted = client.post("/v1/tasks", json=TASK).get_json()
    path = accepted["links"]["self"]
    with outage(state, migrated_url, request):
        # A full file still has room in its last pages: for a small change, and not for a long text.
        asked = [client.post("/v1/tasks", json=TASK | {"metadata": {f"note {n}": "long " * 100 for n in range(16)}})]
        asked += [client.delete(path)] if state != "full" else []
        for answer in asked:
            assert (answer.status_code, answer.json["code"]) == (503, "database_unavailable")
            assert int(answer.headers["Retry-After"]) > 0
        assert messages() == 1
        if state == "away" and migrated_url.startswith("postgresql"):
            ready = client.get("/readyz")
            assert (ready.status_code, "database" in ready.json["missing"]) == (503, True)
        else:
            assert client.get(path).json["status"] == "queued", "it may still be read"
    wait_until(lambda: client.post("/v1/tasks", json=TASK).status_code == 202, BACK_S, "the database to be used again")
    assert (states(), messages()) == (["queued"] * 2, 2)
    assert terminal_events() == 0
    assert client.delete(path).status_code == 200
    assert sorted(states()) == ["cancelled", "queued"]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
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
def outage(state: str, url: str, request: pytest.FixtureRequest) -> Iterator[None]:
    """Bring the database into `state` for a while."""
    if url.startswith("sqlite"):
        with {"away": locked, "full": full_file, "read-only": read_only_file}[state](url):
            yield
        return
    if state == "away":
        server: PostgresServer = request.getfixturevalue("postgres_server")
        server.kill()
        yield
        server.start()
        return
    with {"full": full_disk, "read-only": read_only_server}[state](url):
        yield


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Have somebody else write into the file, and not end. Reading still works, which is as it should be."""
    with closing(sqlite3.connect(make_url(url).database or "", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@contextmanager
def full_file(url: str) -> Iterator[None]:
    """Let the file grow no more: SQLite says then what it says of a full disk."""
    with closing(sqlite3.connect(make_url(url).database or "")) as connection:
        [pages] = connection.execute("PRAGMA page_count").fetchone()
        # What is free inside of the file may still be used up.
        connection.execute("VACUUM")
    with pragma(f"max_page_count = {pages}", "max_page_count = 1073741823"):
        yield


@contextmanager
def read_only_file(_url: str) -> Iterator[None]:
    """Let nobody write, as on a file system that was remounted after a fault."""
    with pragma("query_only = ON", "query_only = OFF"):
        yield


@contextmanager
def pragma(during: str, afterwards: str) -> Iterator[None]:
    """Set a pragma of every SQLite connection whenever it begins something."""
    wanted = [during]

    def set_it(connection: Connection) -> None:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(f"PRAGMA {wanted[0]}")

    sa.event.listen(sa.engine.Engine, "begin", set_it)
    LISTENERS.append(set_it)
    try:
        yield
        wanted[0] = afterwards
        with closing(Database(settings().database)) as database:
            database.read(lambda on: on.execute(sa.text("SELECT 1")).scalar())
    finally:
        # Connections of the gateway get the second value when they begin something; so it stays until the test's end.
        wanted[0] = afterwards


@contextmanager
def full_disk(url: str) -> Iterator[None]:
    """Have PostgreSQL refuse to store a request with the error that it has for a full disk."""
    with administrator(url) as connection:
        connection.execute(
            "CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$"
        )
        for table in ("requests", "audit_events"):
            connection.execute(
                f"CREATE TRIGGER full_disk BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION no_space()"
            )
        yield
        connection.execute("DROP FUNCTION no_space CASCADE")


@contextmanager
def read_only_server(url: str) -> Iterator[None]:
    """Let every connection only read, as to a server that has become a replica."""
    others = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    with administrator(url) as connection:
        name = make_url(url).database
        connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        connection.execute(others)
        yield
        # Nobody ends the connections that were made meanwhile: the gateway must not go on with one of them.
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')


def administrator(url: str) -> psycopg.Connection:
    """Return a connection of our own."""
    parts = make_url(url)
    return psycopg.connect(
        host=str(parts.query["host"]), user=parts.username, dbname=parts.database, autocommit=True, connect_timeout=5
    )


def messages() -> int:
    """Return how many messages wait in the queue."""
    with redis.Redis.from_url(settings().gateway.request_queue_url) as queue:
        count: Any = queue.hlen("metaqore:gpu:messages")
        return int(count)


def states() -> list[str]:
    """Return the states of all stored requests."""
    with closing(Database(settings().database)) as database:
        return database.read(lambda on: list(on.execute(sa.select(requests.c.state)).scalars()))


def terminal_events() -> int:
    """Return how many of them have ended."""
    query = sa.select(sa.func.count()).where(audit_events.c.kind.not_in(("received", "admitted")))
    with closing(Database(settings().database)) as database:
        return database.read(lambda on: on.execute(query).scalar_one())
