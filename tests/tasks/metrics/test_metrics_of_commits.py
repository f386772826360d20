"""What is counted of commits is what was committed: no more after a rollback, no less after a retry."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from prometheus_client import REGISTRY as UNUSED
from prometheus_client.registry import CollectorRegistry
from sqlalchemy.engine import Connection

from tasks.audit.events import Subject, event, record
from tasks.db import Database
from tasks.errors import DatabaseUnavailable
from tasks.ids import new_request_id
from tasks.metrics.making import INSTRUMENTS
from tasks.metrics.own import Own
from tasks.metrics.shared import OTHER
from tasks.settings import DatabaseGroup
from tests.services import free_port

TOLD = INSTRUMENTS["gateway"]


@pytest.fixture
def database_kind() -> str:
    """Return SQLite: both are written to by the same thread."""
    return "sqlite"


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """Return a database that has all tables."""
    made = Database(DatabaseGroup(url=migrated_url))
    yield made
    made.close()


def counted(name: str, registry: CollectorRegistry = TOLD, **labels: str) -> float:
    """Return what is told now."""
    return registry.get_sample_value(f"metaqore_{name}", labels) or 0.0


def ended(request_id: str, code: str | None = None) -> dict[str, object]:
    """Return the last event of a request."""
    return event(Subject(request_id, "default", "key_1"), "failed", code=code)


def recording(code: str | None) -> Callable[[Connection], None]:
    """Return what records an end with this code."""
    return lambda connection: record(connection, ended(new_request_id(), code))


def test_events_count_once_they_are_committed(database: Database) -> None:
    """Each by kind and code; a write that fails takes its own with it, and a group's others are counted once."""

    def fails(connection: Connection) -> None:
        record(connection, ended(new_request_id(), "engine_failed"))
        raise ZeroDivisionError

    before = {code: counted("audit_events_total", kind="failed", code=code) for code in ("engine_failed", "", OTHER)}
    commits, writes = counted("database_commit_seconds_count"), counted("database_commit_writes_sum")
    lag = counted("audit_commit_lag_seconds_count")
    # They wait for one another and so make a group, which fails and is taken apart.
    blocked = database.submit(lambda connection: connection.exec_driver_sql("SELECT 1") and None)
    codes = ("engine_failed", None, "a code of a newer release")
    futures = [database.submit(recording(code)) for code in codes]
    failing = database.submit(fails)
    blocked.result()
    for future in futures:
        future.result()
    with pytest.raises(ZeroDivisionError):
        failing.result()
    after = {code: counted("audit_events_total", kind="failed", code=code) - before[code] for code in before}
    assert after == {"engine_failed": 1, "": 1, OTHER: 1}
    assert counted("database_commit_writes_sum") - writes == 4
    assert 1 <= counted("database_commit_seconds_count") - commits <= 4
    assert counted("audit_commit_lag_seconds_count") - lag == counted("database_commit_seconds_count") - commits


def test_a_database_that_is_away_is_counted() -> None:
    """Each group that could not be committed."""
    database = Database(DatabaseGroup(url=f"postgresql://nobody@127.0.0.1:{free_port()}/nothing", timeout_s=5))
    before = counted("database_commits_failed_total", reason="away")
    with pytest.raises(DatabaseUnavailable):
        database.write(lambda _connection: None)
    assert counted("database_commits_failed_total", reason="away") == before + 1
    database.close()


def test_what_waits_is_told(database: Database) -> None:
    """How many writes wait, and for how long the oldest has; and which connections are in use."""
    registry = CollectorRegistry()
    registry.register(Own("gateway", database))

    def look(connection: Connection) -> tuple[float, float]:
        del connection
        return counted("database_uncommitted_writes", registry), counted("audit_uncommitted_seconds", registry)

    writes, age_s = database.write(look)
    assert writes == 1
    assert 0 < age_s < 60
    assert database.read(lambda _connection: counted("database_pool_connections", registry, state="in_use")) == 1
    assert counted("database_pool_connections", registry, state="in_use") == 0
    assert counted("database_pool_size", registry) == database.load.size == 8


def test_nothing_is_told_elsewhere() -> None:
    """The library's own registry, which others use, has none of these."""
    assert not [metric.name for metric in UNUSED.collect() if metric.name.startswith("metaqore")]
