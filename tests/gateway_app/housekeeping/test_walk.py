"""The walk through the open requests: whole pages in order, none twice, and nothing read but what is open."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.housekeeping import walk
from tasks.db import Database, now
from tasks.db_engine import create_engine
from tasks.ids import lower_bound, new_request_id
from tasks.schema import requests
from tasks.settings import DatabaseGroup

OPEN, ENDED = 30, 3000


def row(request_id: str, *, ended: bool, state: str = "queued") -> dict[str, object]:
    """Return a request's row."""
    at = now()
    return {
        "request_id": request_id,
        "organization": "default",
        "api_key_id": "key_1",
        "agent_name": "agent",
        "static_profile_hash": "0" * 64,
        "state": "completed" if ended else state,
        "epoch": 1,
        "attempt": 0,
        "excused": 0,
        "created_at": at,
        "published_at": at,
        "finished_at": at if ended else None,
        "api": "tasks",
        "priority": "normal",
    }


@pytest.fixture
def database(migrated_url: str) -> Database:
    """Return a database with a few open requests among many that have ended."""
    database = Database(DatabaseGroup(url=migrated_url))
    rows = [row(new_request_id(), ended=number % (ENDED // OPEN) != 0) for number in range(ENDED)]
    database.write(lambda on: on.execute(sa.insert(requests), rows) and None)
    return database


def test_the_walk_meets_every_open_request_once(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their ids; no page is longer than it may be, and what came this very moment waits."""
    monkeypatch.setattr(walk, "GRACE_S", -1.0)
    wanted = database.read(
        lambda on: list(
            on.execute(
                sa.select(requests.c.request_id).where(requests.c.finished_at.is_(None)).order_by(requests.c.request_id)
            ).scalars()
        )
    )
    assert len(wanted) == OPEN
    met: list[str] = []

    def page() -> list[walk.OpenRequest]:
        return database.read(lambda on: walk.page(on, met[-1] if met else "", 7))

    while rows := page():
        assert len(rows) <= 7
        met += [request.request_id for request in rows]
    assert met == wanted
    monkeypatch.setattr(walk, "GRACE_S", 60.0)
    assert database.read(lambda on: walk.page(on, "", 7)) == []
    database.close()


def test_a_page_says_what_redis_knows_the_message_by(database: Database) -> None:
    """And whether a worker has it, at which attempt."""
    request_id = lower_bound(now() - timedelta(hours=1)) + new_request_id()[15:]
    running = row(request_id, ended=False, state="running") | {"epoch": 3, "attempt": 2}
    database.write(lambda on: on.execute(sa.insert(requests), running) and None)
    [page] = database.read(lambda on: walk.page(on, "", 1))
    assert (page.request_id, page.tag, page.attempt, page.running) == (request_id, f"{request_id}:3", 2, True)
    database.close()


def test_a_page_is_read_from_the_index_of_open_requests(migrated_url: str, database: Database) -> None:
    """Whatever has ended costs nothing; the database says that it does not look at it."""
    database.close()
    seen: list[str] = []

    def note(on: Connection, _cursor: object, statement: str, parameters: object, *_more: object) -> None:
        if statement.startswith("SELECT requests.request_id, requests.epoch") and not seen:
            seen.append(statement)
            explain = "EXPLAIN QUERY PLAN " if on.dialect.name == "sqlite" else "EXPLAIN ANALYZE "
            seen.extend(str(line) for line in on.exec_driver_sql(explain + statement, parameters))  # type: ignore[arg-type]

    engine = create_engine(DatabaseGroup(url=migrated_url))
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            # It knows then that they are few, and would read them all to sort them, as it would a million taken for few.
            connection.exec_driver_sql("ANALYZE requests")
        sa.event.listen(connection, "before_cursor_execute", note)
        walk.page(connection, "", walk.PAGE)
    engine.dispose()
    _, *plan = seen
    assert any("requests_open" in line or "request_id_idx" in line for line in plan), plan
    # PostgreSQL reads an empty partition as it likes; what counts is that no row is read in vain, nor all sorted.
    assert not any("Rows Removed" in line or "Sort  (" in line or "SCAN requests" in line for line in plan), plan
