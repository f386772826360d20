"""The migrated tables are the ones the code thinks it has, on both databases, whoever migrates and however often."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from tasks.audit.events import Subject, event
from tasks.db import now
from tasks.db_engine import create_engine
from tasks.errors import ConfigurationError
from tasks.ids import PREFIX, new_request_id
from tasks.migrating import MIGRATIONS, Schema, pending_migrations, read_schema, upgrade
from tasks.schema import api_keys, audit_events, metadata, requests
from tasks.schema_profiles import agents, profile_versions
from tasks.settings import DatabaseGroup

ROOT = Path(__file__).resolve().parents[1]
PARTITIONED = ("requests", "audit_events")
#: Waits for a line, then migrates: so that several begin in the same moment.
UPGRADER = """
import sys
from tasks.migrating import upgrade
print("ready", flush=True)
sys.stdin.readline()
upgrade(sys.argv[1])
"""


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """Connect as the product does, in a transaction that is committed at the end."""
    engine = create_engine(DatabaseGroup(url=url))
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def revisions() -> list[str]:
    """Return all revisions, oldest first."""
    return [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()][::-1]


def structure(connection: Connection) -> dict[str, Any]:
    """Return what there is in a database, comparably: columns, keys, indexes, triggers, views and partitions."""
    if connection.dialect.name == "sqlite":
        return _pairs(connection.exec_driver_sql("SELECT type || ' ' || name, sql FROM sqlite_master"))
    inspector = sa.inspect(connection)
    found: dict[str, Any] = {
        name: (
            [(column["name"], str(column["type"]), column["nullable"]) for column in inspector.get_columns(name)],
            sorted(str(index["name"]) for index in inspector.get_indexes(name)),
            inspector.get_pk_constraint(name)["constrained_columns"],
        )
        for name in inspector.get_table_names()
    }
    found["triggers"] = sorted(
        connection.exec_driver_sql("SELECT tgrelid::regclass || '.' || tgname FROM pg_trigger").scalars()
    )
    found["views"] = inspector.get_view_names()
    return found


def test_migrated_tables_equal_the_metadata(database_url: str) -> None:
    """Alembic finds nothing that it would change, types included."""
    upgrade(database_url)

    def compared(_item: object, name: str | None, kind: str, *_rest: object) -> bool:
        # A partition is no table of its own.
        return kind != "table" or name in metadata.tables or not _is_partition(name)

    with connected(database_url) as connection:
        options = {"compare_type": True, "include_object": compared}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []
        # What Alembic doesn't compare: that constraints and the condition of the partial index say the same.
        migrated = sa.inspect(connection)
        for table in metadata.tables.values():
            checks = {str(check["name"]) for check in migrated.get_check_constraints(table.name)}
            assert checks == {str(item.name) for item in table.constraints if isinstance(item, sa.CheckConstraint)}
        assert "audit_requests" in migrated.get_view_names()


def _is_partition(name: str | None) -> bool:
    return name is not None and name.startswith(tuple(f"{table}_" for table in PARTITIONED))


def test_the_comparison_sees_differences(database_url: str) -> None:
    """A test of the test above: a missing column, another type and a missing index are found."""
    upgrade(database_url)
    with connected(database_url) as connection:
        connection.exec_driver_sql("DROP INDEX requests_by_organization")
        connection.exec_driver_sql("ALTER TABLE profiles DROP COLUMN version")
        found = compare_metadata(MigrationContext.configure(connection), metadata)
    kinds = {difference[0] for difference in found if isinstance(difference, tuple)}
    assert {"add_index", "add_column"} <= kinds


def test_upgrading_again_changes_nothing(database_url: str) -> None:
    """Each start of the gateway may migrate; data stays."""
    upgrade(database_url)
    with connected(database_url) as connection:
        before = structure(connection)
        connection.execute(sa.insert(requests), _request(new_request_id()))
    upgrade(database_url)
    with connected(database_url) as connection:
        assert structure(connection) == before
        assert connection.execute(sa.select(sa.func.count()).select_from(requests)).scalar_one() == 1
        assert connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all() == revisions()[-1:]


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_upgrades_at_once(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Several processes that start on an empty database at once all succeed, and the tables are made once."""
    url = request.getfixturevalue("postgres_url") if kind == "postgresql" else f"sqlite:///{tmp_path / 'gateway.db'}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UPGRADER, url],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ends = [(process.communicate(timeout=60)[1].strip().splitlines()[-1:], process.returncode) for process in processes]
    assert [code for _, code in ends] == [0] * len(processes), ends
    with connected(url) as connection:
        assert pending_migrations(connection) == []


def test_pending_migrations(database_url: str) -> None:
    """All of them before, oldest first; none after."""
    with connected(database_url) as connection:
        assert pending_migrations(connection) == revisions()
    upgrade(database_url)
    with connected(database_url) as connection:
        assert pending_migrations(connection) == []


def test_a_new_file_is_private(tmp_path: Path) -> None:
    """Nobody else reads it, nor the files that SQLite makes beside it, whatever the umask; an older one keeps its mode."""
    path = tmp_path / "gateway.db"
    before = os.umask(0o022)
    try:
        upgrade(f"sqlite:///{path}")
        with connected(f"sqlite:///{path}") as connection:
            connection.exec_driver_sql("CREATE TABLE something (x)")
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) >= {"gateway.db", "gateway.db-wal"}
    assert set(modes.values()) == {0o600}
    path.chmod(0o640)
    upgrade(f"sqlite:///{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_database_that_cannot_be_reached(tmp_path: Path) -> None:
    """An error that operators can read, without the URL's password."""
    url = f"postgresql+psycopg://user:hunter2@/gateway?host={tmp_path}"
    with pytest.raises(ConfigurationError) as caught:
        upgrade(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("0001_first_tables.py", "op.execute(VIEW)"),
        ("0002_whole_api.py", '"CREATE INDEX idempotency_keys_by_time ON idempotency_keys (created_at)"'),
    ],
)
def test_an_interrupted_upgrade_leaves_nothing(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, statement: str
) -> None:
    """A migration is one transaction: where its last statement fails, the next try begins at the beginning."""
    copy = tmp_path / "migrations"
    shutil.copytree(MIGRATIONS, copy)
    revision = copy / "versions" / name
    content = revision.read_text("utf-8")
    assert statement in content
    nonsense = "op.execute('CREATE NONSENSE')" if statement.startswith("op.") else "'CREATE NONSENSE'"
    revision.write_text(content.replace(statement, nonsense), "utf-8")
    with monkeypatch.context() as patched:
        patched.setattr("tasks.migrating.MIGRATIONS", copy)
        with pytest.raises((sa.exc.DBAPIError, ConfigurationError)):
            upgrade(database_url)
    with connected(database_url) as connection:
        assert set(sa.inspect(connection).get_table_names()) <= {"alembic_version"}
    upgrade(database_url)
    with connected(database_url) as connection:
        assert pending_migrations(connection) == []


def test_requests_of_the_release_before(database_url: str) -> None:
    """They are still there, as what they were; and a gateway of that release, which knows no new columns, goes on."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    command.upgrade(config, "0001")
    old = sa.Table("requests", sa.MetaData(), *(sa.Column(name) for name in _request("")))
    ids = [new_request_id(), new_request_id()]
    row = _request(ids[0]) | {"created_at": "2026-11-24 12:00:00", "published_at": "2026-11-24 12:00:00"}
    with connected(database_url) as connection:
        connection.execute(sa.insert(old), row)
    upgrade(database_url)
    with connected(database_url) as connection:
        connection.execute(sa.insert(old), row | {"request_id": ids[1]})
        rows = connection.execute(sa.select(requests).order_by(requests.c.request_id)).all()
    assert [row.request_id for row in rows] == ids
    for found in rows:
        assert (found.api, found.priority, found.state) == ("tasks", "normal", "queued")
        assert (found.project_id, found.deadline, found.cancel_requested_at) == (None, None, None)


def test_profiles_of_the_release_before(database_url: str) -> None:
    """They are still there with what they were; what was active once is no draft; that release's gateways go on."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    command.upgrade(config, "0006")
    at = "2026-11-24 12:00:00"
    agent = {"organization": "acme", "newest_version": 3, "version_count": 3, "created_at": at, "activated_at": at}
    version = {"organization": "acme", "agent_name": "poet", "data_key": b"k", "description": b"d", "segments": b"s"}
    version |= {"created_at": "2026-11-20 12:00:00", "created_by": "key_1"}
    known = {"prefix_base": "b" * 64, "static_profile_hash": "h" * 64, "static_token_count": 5, "joinable": True}
    unknown = dict.fromkeys(known)
    old_agents, old_versions = (
        sa.table(name, *map(sa.column, columns))
        for name, columns in (
            ("agents", (*agent, "agent_name", "active_version")),
            ("profile_versions", (*version, *known, "version")),
        )
    )

    def write(name: str, active: int | None) -> None:
        connection.execute(sa.insert(old_agents), agent | {"agent_name": name, "active_version": active})
        rows = [{"version": 1, **known}, {"version": 2, **known}, {"version": 3, **unknown}]
        connection.execute(sa.insert(old_versions), [version | row | {"agent_name": name} for row in rows])

    with connected(database_url) as connection:
        write("poet", 2)
        write("idle", None)
    upgrade(database_url)
    with connected(database_url) as connection:
        write("late", 2)
        made = connection.execute(sa.select(agents).order_by(agents.c.agent_name)).all()
        versions = connection.execute(
            sa.select(profile_versions).order_by(profile_versions.c.agent_name, profile_versions.c.version)
        ).all()
    assert [(row.agent_name, row.active_version, row.revision) for row in made] == [
        ("idle", None, 0), ("late", 2, 0), ("poet", 2, 0),
    ]  # fmt: skip
    for row in made:
        assert {row.previous_version, row.retired_at, row.canary_version, row.canary_share, row.canary_since} == {None}
    for one in versions:
        assert (one.data_key, one.description, one.segments, one.created_by) == (b"k", b"d", b"s", "key_1")
        assert (one.extends, one.abstract, one.author, one.reason, one.pins, one.inherited) == (
            None, False, None, None, None, None,
        )  # fmt: skip
    used = [(one.agent_name, one.activated_at and one.activated_at.day) for one in versions]
    assert used == [
        *(("idle", 20), ("idle", 20), ("idle", None)),
        *(("late", None), ("late", None), ("late", None)),
        *(("poet", 20), ("poet", 24), ("poet", None)),
    ]


def test_the_record_of_the_release_before(database_url: str) -> None:
    """Every event, key and row number is what it was, and the record takes inserts only, of more kinds than before."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    command.upgrade(config, "0004")
    subjects = [Subject(new_request_id(), "acme", "key_1", "prüfer") for _ in range(3)]
    details = {"veto": {"reason": "ü 😀", "details": {"policy": "x"}}, "finish_reason": None}
    kinds = ("received", "admitted", "started", "completed")
    events = [event(subjects[0], kind, attempt=int(kind in kinds[2:]), policy="p", queued_ms=0.125) for kind in kinds]
    events += [event(subjects[1], "received"), event(subjects[1], "vetoed", details=details, reason="r" * 200)]
    key = {"key_id": "key_1", "organization": "acme", "name": "old", "key_hash": b"\x00" * 32, "created_at": now()}
    keys = sa.Table("api_keys", sa.MetaData(), *(sa.Column(name, api_keys.c[name].type) for name in key))
    with connected(database_url) as connection:
        columns = [str(column["name"]) for column in sa.inspect(connection).get_columns("audit_events")]
        old = sa.Table("audit_events", sa.MetaData(), *(sa.Column(name, audit_events.c[name].type) for name in columns))
        for row in events:
            connection.execute(sa.insert(old), row)
        if connection.dialect.name == "sqlite":
            # Numbers have gaps where an insert was rolled back or a row was numbered by hand.
            numbered = "INSERT INTO audit_events (rowid, request_id, kind, attempt, epoch, occurred_at, organization, api_key_id)"
            connection.exec_driver_sql(
                f"{numbered} VALUES (1000, ?, 'received', 0, 0, '2026-01-01 00:00:00', 'acme', 'key_1')",
                (subjects[2].request_id,),
            )
        connection.execute(sa.insert(keys), key)
        before = _record(connection, columns)
    upgrade(database_url)
    with connected(database_url) as connection:
        assert _record(connection, columns) == before
        assert connection.execute(sa.select(api_keys.c.role)).scalars().all() == ["member"]
        connection.execute(sa.insert(keys), {**key, "key_id": "key_2", "key_hash": b"\x01" * 32})
        changed = event(Subject(new_request_id(), "acme", "cli"), "policy_changed", reason="ü" * 500)
        connection.execute(sa.insert(audit_events), changed)
        assert len(_record(connection, columns)[1]) == len(before[1])
    inserted = "INSERT INTO audit_events (request_id, kind, attempt, epoch, occurred_at, organization, api_key_id)"
    same = "7, 1, occurred_at, organization, api_key_id FROM audit_events"
    for statement in (
        "UPDATE audit_events SET reason = 'forged'",
        "DELETE FROM audit_events",
        "UPDATE api_keys SET role = 'owner'",
        "INSERT INTO audit_events SELECT * FROM audit_events WHERE kind = 'received'",
        f"{inserted} SELECT request_id, 'failed', {same} WHERE kind = 'completed'",
        f"{inserted} SELECT request_id, 'nonsense', {same}",
    ):
        with pytest.raises(sa.exc.DBAPIError), connected(database_url) as connection:
            connection.exec_driver_sql(statement)


def _record(connection: Connection, columns: list[str]) -> tuple[list[Any], list[Any]]:
    """Return all events of requests with their row numbers, where there are any, and the view's rows."""
    number = "rowid" if connection.dialect.name == "sqlite" else "0"
    query = (
        f"SELECT {number}, {', '.join(columns)} FROM audit_events"
        " WHERE kind <> 'policy_changed' ORDER BY request_id, kind"
    )
    view = "SELECT * FROM audit_requests ORDER BY request_id"
    return [[tuple(row) for row in connection.exec_driver_sql(text)] for text in (query, view)]  # type: ignore[return-value]


def test_requests_that_were_open_before_messages_were_kept(database_url: str) -> None:
    """Every request and event of 0007 is what it was, row numbers too; a gateway of that release goes on; and what the
    new release writes is taken, or refused where it would be a second one.
    """
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    command.upgrade(config, "0007")
    states = ("queued", "running", "completed", "failed", "cancelled", "expired")
    rows = [_whole_request(state) for state in states]
    with connected(database_url) as connection:
        columns = [str(column["name"]) for column in sa.inspect(connection).get_columns("requests")]
        old = sa.Table("requests", sa.MetaData(), *(sa.Column(name, requests.c[name].type) for name in columns))
        events = [_event_of(row, kind) for row in rows for kind in ("received", "admitted", row["state"])]
        events = [event for event in events if event["kind"] not in ("queued", "running")]
        facts = [*events[0], "written_in"] if connection.dialect.name == "sqlite" else list(events[0])
        for row in rows:
            connection.execute(sa.insert(old), row)
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("UPDATE requests SET rowid = rowid + 1000 WHERE state = 'running'")
        for event_row in events:
            connection.execute(sa.insert(audit_events), event_row)
        before = _requests(connection, columns), _record(connection, facts)
    upgrade(database_url)
    late = _whole_request("queued")
    with connected(database_url) as connection:
        assert (_requests(connection, columns), _record(connection, facts)) == before
        connection.execute(sa.insert(old), late)
        for found in connection.execute(sa.select(requests)):
            assert (found.message, found.prompt_tokens, found.excused, found.not_before) == (None, None, 0, None)
        connection.execute(sa.update(requests).where(requests.c.state == "queued").values(state="dead"))
        for epoch in (1, 2):
            connection.execute(sa.insert(audit_events), _event_of(rows[0], "requeued", epoch=epoch))
        connection.execute(sa.insert(audit_events), _event_of(rows[0], "dead"))
        view = connection.execute(
            sa.text("SELECT outcome FROM audit_requests WHERE request_id = :id"), {"id": rows[0]["request_id"]}
        )
        assert view.scalar_one() == "dead"
    for refused in (
        _event_of(rows[0], "requeued", epoch=2),
        _event_of(rows[0], "failed"),
        _event_of(rows[2], "dead"),
        _event_of(rows[1], "nonsense"),
    ):
        with pytest.raises(sa.exc.IntegrityError), connected(database_url) as connection:
            connection.execute(sa.insert(audit_events), refused)
    for statement in (
        "UPDATE audit_events SET reason = 'forged'",
        "DELETE FROM audit_events",
        "UPDATE requests SET state = 'lost'",
    ):
        with pytest.raises(sa.exc.DBAPIError), connected(database_url) as connection:
            connection.exec_driver_sql(statement)
    if database_url.startswith("sqlite"):
        _nothing_is_replaced(database_url)


def _nothing_is_replaced(url: str) -> None:
    """REPLACE deletes what is in its way, and fires no trigger but that of the insertion."""
    for key in ("kind, attempt, epoch", "'failed', 7, 7"):
        statement = (
            "REPLACE INTO audit_events (request_id, kind, attempt, epoch, occurred_at, organization, api_key_id)"
            f" SELECT request_id, {key}, occurred_at, organization, api_key_id FROM audit_events"
            " WHERE kind IN ('completed', 'requeued')"
        )
        with pytest.raises(sa.exc.DBAPIError, match="insert-only"), connected(url) as connection:
            connection.exec_driver_sql(statement)


def _whole_request(state: str) -> dict[str, Any]:
    """Return a row of 0007 with something in every column."""
    return {
        **_request(new_request_id()),
        "state": state,
        "epoch": 2,
        "attempt": 3,
        "worker": "gpu-1",
        "finished_at": None if state in ("queued", "running") else now(),
        "error_code": "engine_failed" if state == "failed" else None,
        "data_key": b"key",
        "payload": b"payload",
        "result": b"result" if state == "completed" else None,
        "api": "chat",
        "priority": "high",
        "project_id": "proj_ü",
        "deadline": now() + timedelta(hours=1),
        "cancel_requested_at": now() if state == "cancelled" else None,
    }


def _event_of(row: dict[str, Any], kind: str, epoch: int = 1) -> dict[str, Any]:
    return event(Subject(row["request_id"], "acme", "key_1", "prüfer"), kind, epoch=epoch, details={"x": [1, "ü"]})


def _requests(connection: Connection, columns: list[str]) -> list[Any]:
    """Return these columns of all requests, with their row numbers, where there are any."""
    number = "rowid" if connection.dialect.name == "sqlite" else "0"
    query = f"SELECT {number}, {', '.join(columns)} FROM requests ORDER BY request_id"
    return [tuple(row) for row in connection.exec_driver_sql(query)]


def test_a_database_of_a_newer_release(database_url: str) -> None:
    """The code of the release before runs on it: it knows that it is newer, misses nothing, and leaves it as it is."""
    upgrade(database_url)
    with connected(database_url) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    upgrade(database_url)
    with connected(database_url) as connection:
        assert read_schema(connection) == Schema("9999", (), is_newer=True)
        assert pending_migrations(connection) == []


def test_rows_go_to_the_partition_of_their_month(postgres_url: str) -> None:
    """Of the coming 24 months each has a partition: its first and its last possible id lie in it, and nowhere else."""
    upgrade(postgres_url)
    with connected(postgres_url) as connection:
        names = set(_partitions(connection, "requests"))
        months = sorted(name.removeprefix("requests_") for name in names - {"requests_rest"})
        assert months == [f"{month:%Y_%m}" for month in _months(24)]
        assert {name.replace("requests_", "audit_events_") for name in names} == set(
            _partitions(connection, "audit_events")
        )
        expected = {}
        for start, end in zip(_months(24), _months(25)[1:], strict=True):
            for moment, tail in ((start, "7" + "0" * 3 + "8" + "0" * 15), (end - MILLISECOND, "7fffb" + "f" * 15)):
                expected[_insert(connection, _id_at(moment, tail))] = f"{start:%Y_%m}"
        for table in (requests, audit_events):
            found = sa.text(f"SELECT request_id, tableoid::regclass::text FROM {table.name}")
            places = _pairs(connection.execute(found))
            assert places == {request_id: f"{table.name}_{month}" for request_id, month in expected.items()}


def test_rows_outside_all_months_go_to_the_default_partition(postgres_url: str) -> None:
    """An insert never fails for want of a partition: ids of last year, of the year 2100, and the highest of all."""
    upgrade(postgres_url)
    moments = [now() - timedelta(days=400), _months(25)[-1], datetime(2100, 1, 1, tzinfo=UTC)]
    ids = [_id_at(moment, "7fffb" + "f" * 15) for moment in moments] + [PREFIX + "f" * 12 + "7fffb" + "f" * 15]
    with connected(postgres_url) as connection:
        for request_id in ids:
            _insert(connection, request_id)
        for table in PARTITIONED:
            rows = connection.exec_driver_sql(f"SELECT request_id FROM {table}_rest ORDER BY request_id")
            assert list(rows.scalars()) == sorted(ids)


def test_ids_are_compared_byte_by_byte(postgres_url: str) -> None:
    """Whatever the database's locale: else partitions and the order of time would not agree."""
    upgrade(postgres_url)
    query = "SELECT table_name, collation_name FROM information_schema.columns WHERE column_name = 'request_id'"
    with connected(postgres_url) as connection:
        collations = _pairs(connection.exec_driver_sql(query))
    assert len(collations) >= 2 * 26
    assert set(collations.values()) == {"C"}


def test_there_is_no_way_back(database_url: str) -> None:
    """A downgrade would drop the record."""
    upgrade(database_url)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    with pytest.raises(NotImplementedError):
        command.downgrade(config, "base")
    with connected(database_url) as connection:
        assert pending_migrations(connection) == []


MILLISECOND = timedelta(milliseconds=1)


def _pairs(rows: Iterable[Any]) -> dict[str, str]:
    return {row[0]: row[1] for row in rows}


def _months(count: int) -> list[datetime]:
    """Return the first instants of `count` months, the current one first."""
    number = now().year * 12 + now().month - 1
    return [datetime((number + ahead) // 12, (number + ahead) % 12 + 1, 1, tzinfo=UTC) for ahead in range(count)]


def _id_at(moment: datetime, tail: str) -> str:
    milliseconds = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // MILLISECOND
    return f"{PREFIX}{milliseconds:012x}{tail}"


def _partitions(connection: Connection, table: str) -> list[str]:
    query = sa.text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = CAST(:parent AS regclass)")
    return list(connection.execute(query, {"parent": table}).scalars())


def _insert(connection: Connection, request_id: str) -> str:
    """Store a request with an event, and return its id."""
    connection.execute(sa.insert(requests), _request(request_id))
    connection.execute(sa.insert(audit_events), event(Subject(request_id, "acme", "key_1"), "received"))
    return request_id


def _request(request_id: str) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "organization": "acme",
        "api_key_id": "key_1",
        "agent_name": "incident-responder",
        "static_profile_hash": "0" * 64,
        "state": "queued",
        "epoch": 1,
        "attempt": 0,
        "created_at": now(),
        "published_at": now(),
    }
