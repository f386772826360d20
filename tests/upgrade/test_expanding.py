"""Each migration after the release before only adds what that release does not miss, and holds nobody up for long."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Engine

from tasks.db_engine import create_engine
from tasks.migrating import MIGRATIONS, upgrade
from tasks.settings import DatabaseGroup
from tests.upgrade import previous_release
from tests.upgrade.structure import PARTITION, Structure, Table, breaks, structure

INDEX = re.compile(
    r"CREATE\s+(?:UNIQUE\s+)?INDEX\s+(?!CONCURRENTLY\b)(?:IF\s+NOT\s+EXISTS\s+)?\w+\s+ON\s+(?:ONLY\s+)?(\w+)",
    re.IGNORECASE,
)
#: On SQLite a NOT NULL column without a default, another type and another constraint can only come with a new table.
ON_BOTH = {
    "ALTER TABLE requests RENAME COLUMN excused TO pardoned": "column excused is gone",
    "ALTER TABLE requests DROP COLUMN project_id": "column project_id is gone",
    "DROP TABLE idempotency_keys": "idempotency_keys is gone",
    "ALTER TABLE agents RENAME TO assistants": "agents is gone",
    "DROP VIEW audit_requests": "audit_requests is gone",
    "CREATE UNIQUE INDEX one_name ON api_keys (name)": "unique were",
}
ON_POSTGRESQL = {
    "ALTER TABLE api_keys ADD COLUMN owner TEXT NOT NULL": "column owner must be filled in",
    "ALTER TABLE requests ALTER COLUMN excused TYPE BIGINT": "column excused was",
    "ALTER TABLE requests ALTER COLUMN worker SET NOT NULL": "column worker was",
    "ALTER TABLE requests ADD CONSTRAINT positive CHECK (attempt > 0)": "checks were",
}
HARMLESS = (
    "ALTER TABLE requests ADD COLUMN note TEXT",
    "ALTER TABLE requests ADD COLUMN weight INTEGER DEFAULT 1 NOT NULL",
    "CREATE TABLE notes (note_id INTEGER PRIMARY KEY, request_id TEXT NOT NULL)",
)


def found(url: str, statement: str) -> str:
    """Return what code stumbles over once a statement was run, which is taken back."""
    engine = create_engine(DatabaseGroup(url=url))
    with engine.connect() as connection:
        before = structure(connection)
        connection.exec_driver_sql(statement)
        after = structure(connection)
        connection.rollback()
    engine.dispose()
    return "; ".join(breaks(before, after))


def looked_at(url: str) -> Structure:
    """Return the structure of a database."""
    engine = create_engine(DatabaseGroup(url=url))
    try:
        with engine.connect() as connection:
            return structure(connection)
    finally:
        engine.dispose()


def blocks(statement: str, before: Structure) -> bool:
    """Tell whether a statement builds an index in PostgreSQL while nobody may write to a table that is in use."""
    match = INDEX.search(statement)
    return match is not None and (match[1] in before or PARTITION.fullmatch(match[1]) is not None)


@contextmanager
def listening() -> Iterator[list[str]]:
    """Yield the statements that are run meanwhile."""
    statements: list[str] = []

    def hear(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    sa.event.listen(Engine, "before_cursor_execute", hear)
    try:
        yield statements
    finally:
        sa.event.remove(Engine, "before_cursor_execute", hear)


def test_every_migration_since(database_url: str) -> None:
    """What there is of them takes nothing away, and builds no index on a table in use that nobody may write to meanwhile."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    command.upgrade(config, previous_release.newest_revision())
    before = looked_at(database_url)
    with listening() as statements:
        upgrade(database_url)
    assert breaks(before, looked_at(database_url)) == []
    assert [statement for statement in statements if blocks(statement, before)] == [] or "sqlite" in database_url


@pytest.mark.parametrize("statement", ON_BOTH)
def test_what_takes_something_away(migrated_url: str, statement: str) -> None:
    """A test of the test above: every kind of such a change is found."""
    assert ON_BOTH[statement] in found(migrated_url, statement)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
@pytest.mark.parametrize("statement", ON_POSTGRESQL)
def test_what_takes_something_away_on_postgresql(migrated_url: str, statement: str) -> None:
    """The same for what SQLite has no statement for."""
    assert ON_POSTGRESQL[statement] in found(migrated_url, statement)


@pytest.mark.parametrize("statement", HARMLESS)
def test_what_only_adds(migrated_url: str, statement: str) -> None:
    """It is let be."""
    assert found(migrated_url, statement) == ""


@pytest.mark.parametrize(
    ("statement", "blocking"),
    [
        ("CREATE INDEX by_worker ON requests (worker)", True),
        ("create unique index  by_worker\n  on only requests (worker)", True),
        ("CREATE INDEX by_worker_11 ON requests_2026_11 (worker)", True),
        ("CREATE INDEX IF NOT EXISTS by_worker ON requests (worker)", True),
        ("CREATE INDEX CONCURRENTLY by_worker ON requests_2026_11 (worker)", False),
        ("CREATE INDEX by_note ON notes (note)", False),
    ],
)
def test_an_index_that_blocks(statement: str, blocking: bool) -> None:
    """On a table that was there before; a new one has nobody to hold up."""
    table = Table({}, (), frozenset(), {}, frozenset(), frozenset())
    assert blocks(statement, {"requests": table}) is blocking


def test_migrations_that_were_released_stay_as_they_are() -> None:
    """A database that ran one of them never runs it again."""
    with zipfile.ZipFile(previous_release.WHEEL) as wheel:
        released = [name for name in wheel.namelist() if re.fullmatch(r"migrations/versions/\d{4}_\w+\.py", name)]
        assert len(released) == int(previous_release.newest_revision())
        for name in released:
            assert (MIGRATIONS.parent / name).read_bytes() == wheel.read(name), name
