"""The questions of docs/audit-queries.md give the answers that Python counts, on both databases, to who may only read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tasks.migrating import upgrade
from tasks.schema import KINDS, TERMINAL_KINDS, api_keys, audit_events
from tests.gateway_app.audit.answers import ANSWERS
from tests.gateway_app.audit.counting import Asked, plain
from tests.gateway_app.audit.questions import PAGE, blocks, period, questions
from tests.gateway_app.audit.recorded import DAYS, SINCE, UNTIL, fill
from tests.gateway_app.audit.recorded_changes import FIRST
from tests.gateway_app.audit.shown import parameters
from tests.services import PostgresServer

ROOT = PAGE.parents[1]
QUESTIONS = questions()
#: They tell the same of whatever period.
TIMELESS = {"one-request", "request-row"}
AUDITOR = "auditor"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(
    request: pytest.FixtureRequest, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Return an engine of the owner's, on a database with the record."""
    if request.param == "sqlite":
        url = f"sqlite:///{shutil.copy(sqlite_template, tmp_path_factory.mktemp('queries'))}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.migrated_url(upgrade)
    fill(url)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def reading(filled: Engine) -> Iterator[Engine]:
    """Return an engine that can only read, made as the page says."""
    if filled.dialect.name == "sqlite":
        engine = sa.create_engine(f"sqlite:///file:{filled.url.database}?mode=ro&uri=true")
        yield engine
        engine.dispose()
        return
    statements = blocks()["role"]["postgresql"].replace("CREATE ROLE auditor", f"CREATE ROLE {AUDITOR}")
    with filled.begin() as connection:
        for statement in filter(str.strip, statements.split(";")):
            connection.exec_driver_sql(statement)
    engine = sa.create_engine(filled.url.set(username=AUDITOR))
    try:
        yield engine
    finally:
        engine.dispose()
        with filled.begin() as connection:
            connection.exec_driver_sql(f"DROP OWNED BY {AUDITOR}")
            connection.exec_driver_sql(f"DROP ROLE {AUDITOR}")


def all_events(engine: Engine) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the whole record in the order of its events' times, and the keys' names."""
    # PostgreSQL's own order is that of the room it found for the rows, which is another where rows were deleted before.
    query = sa.select(audit_events).order_by(audit_events.c.occurred_at, audit_events.c.request_id)
    with engine.connect() as connection:
        events = [dict(row) for row in connection.execute(query).mappings()]
        names = connection.execute(sa.select(api_keys.c.key_id, api_keys.c.name))
        return events, {row.key_id: row.name for row in names}


def test_the_record_has_everything(filled: Engine) -> None:
    """All kinds of events, before, in and after the period, and of another organization: else nothing is shown."""
    events, _ = all_events(filled)
    assert {event["kind"] for event in events} == set(KINDS)
    for kind in ("received", "started", *TERMINAL_KINDS):
        at = sorted(event["occurred_at"] for event in events if event["kind"] == kind)
        assert at[0] < SINCE < at[len(at) // 2] < at[-1]
        assert at[-1] > UNTIL
        assert {event["organization"] for event in events if event["kind"] == kind} == {"acme", "umbrella"}


@pytest.mark.parametrize("name", QUESTIONS)
def test_an_answer(filled: Engine, reading: Engine, name: str) -> None:
    """It is what Python counts, and another for another period."""
    events, keys = all_events(filled)
    with reading.connect() as connection:
        given = parameters(connection)
        found = [plain(row) for row in QUESTIONS[name].ask(connection, given)]
        expected = ANSWERS[name](Asked(events, keys, given | {"since": SINCE, "until": UNTIL}))
        assert found == [plain(row) for row in expected]
        assert found, "an empty answer shows nothing"
        always = parameters(connection, FIRST, FIRST + timedelta(days=DAYS + 1))
        assert (found == [plain(row) for row in QUESTIONS[name].ask(connection, always)]) == (name in TIMELESS)


def test_on_a_worker_at_a_moment(filled: Engine, reading: Engine) -> None:
    """What arrived and started before the period, and ended in it, ran in it; what ended before it did not."""
    events, keys = all_events(filled)
    with reading.connect() as connection:
        given = parameters(connection)
        ends = {event["request_id"]: event for event in events if event["kind"] == "completed"}
        [event, *_] = (event for event in events if is_whole(event, ends, given["worker"]))
        since = event["occurred_at"] + timedelta(milliseconds=1)
        until = since + timedelta(hours=6)
        given |= period(since, until) | {"since_id": period(FIRST, FIRST)["since_id"]}
        found = [plain(row) for row in QUESTIONS["on-worker"].ask(connection, given)]
    expected = ANSWERS["on-worker"](Asked(events, keys, given | {"since": since, "until": until}))
    assert found == [plain(row) for row in expected]
    assert found[0]["request_id"] == event["request_id"]
    assert len(found) > 1


def is_whole(event: Mapping[str, Any], ends: Mapping[str, Mapping[str, Any]], worker: str) -> bool:
    """Tell whether this is the start of a worker's only attempt, and completed."""
    end = ends.get(event["request_id"])
    return event["kind"] == "started" and event["worker"] == worker and end is not None and end["attempt"] == 1


@pytest.mark.parametrize("name", QUESTIONS)
def test_nobody_and_nothing(reading: Engine, name: str) -> None:
    """Of an organization, a key, a worker and a time that there are not nothing is told, whatever they are called."""
    hostile = "no'body\"; DROP TABLE audit_events; --"
    with reading.connect() as connection:
        given = parameters(connection, FIRST - timedelta(days=400), FIRST - timedelta(days=399))
        given |= {"organization": hostile, "key_id": hostile, "worker": hostile, "request_id": hostile}
        found = QUESTIONS[name].ask(connection, given)
    if name == "one-end-each":
        assert [set(row.values()) for row in found] == [{0}]
    else:
        assert found == []


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO audit_events SELECT * FROM audit_events",
        "UPDATE audit_events SET code = 'x'",
        "DELETE FROM audit_events",
        "UPDATE api_keys SET revoked_at = NULL",
        "CREATE TABLE mine (x INTEGER)",
    ],
)
def test_who_asks_cannot_write(reading: Engine, statement: str) -> None:
    """Neither to the record nor elsewhere."""
    with reading.connect() as connection, pytest.raises(sa.exc.DBAPIError) as caught:
        connection.exec_driver_sql(statement)
    assert re.search("readonly|read-only|permission denied", str(caught.value))


@pytest.mark.parametrize("filled", ["postgresql"], indirect=True)
@pytest.mark.parametrize("query", ["SELECT payload FROM requests", "SELECT key_hash FROM api_keys", "TABLE profiles"])
def test_who_asks_sees_no_prompts(reading: Engine, query: str) -> None:
    """Not even sealed ones."""
    with reading.connect() as connection, pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        connection.exec_driver_sql(query)


def test_the_id_of_a_moment(reading: Engine) -> None:
    """Both databases make the same id of a moment as the gateway."""
    for moment in (SINCE, datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC)):
        expected = period(moment, moment)
        with reading.connect() as connection:
            query = sa.text(blocks()["id"][connection.dialect.name])
            given = {"since": f"{moment:%Y-%m-%d %H:%M:%S}"}
            assert connection.execute(query, given).scalar_one() == expected["since_id"]


@pytest.mark.parametrize("filled", ["sqlite"], indirect=True)
@pytest.mark.parametrize("name", ["refusals", "detected", "queue-time", "slowest", "policy-version"])
def test_asking_with_python(filled: Engine, reading: Engine, name: str, tmp_path: Path) -> None:
    """The page's program asks as it says."""
    [program] = re.findall(r"^```python ask\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "ask.py").write_text(program, "utf-8")
    words = ["organization=acme", f"since={SINCE:%Y-%m-%d %H:%M:%S}", f"until={UNTIL:%Y-%m-%d %H:%M:%S}"]
    words += ["limit=20", "policy_version=1"]
    command = [sys.executable, str(tmp_path / "ask.py"), str(filled.url.database), name, *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    with reading.connect() as connection:
        rows = QUESTIONS[name].ask(connection, parameters(connection))
    expected = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    assert [line.split("\t") for line in ran.stdout.splitlines()] == expected


@pytest.mark.parametrize("filled", ["postgresql"], indirect=True)
@pytest.mark.parametrize("name", ["refusals", "queue-time", "policy-version"])
def test_asking_with_psql(
    filled: Engine, reading: Engine, name: str, tmp_path: Path, postgres_server: PostgresServer
) -> None:
    """The page's command asks as it says."""
    [command] = re.findall(r"```sh psql\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "question.sql").write_text(QUESTIONS[name].queries["postgresql"], "utf-8")
    command = command.replace("psql", f"{postgres_server._programs / 'psql'} -A -t -v policy_version=1", 1)
    url = f"postgresql://{AUDITOR}@/{reading.url.database}?host={postgres_server.folder}"
    ran = subprocess.run(
        ["/bin/sh", "-euc", command],
        env={"AUDIT_DATABASE_URL": url}, capture_output=True, text=True, timeout=30, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    with reading.connect() as connection:
        rows = QUESTIONS[name].ask(connection, parameters(connection))
    assert [line.split("|")[0] for line in ran.stdout.splitlines()] == [str(next(iter(row.values()))) for row in rows]
    assert ran.stdout


def test_indices_are_used(filled: Engine) -> None:
    """What is asked of all time is found by an index: a change of a query's words must not cost that unnoticed."""
    wanted = {
        "key-activity": "audit_events_by_key",
        **dict.fromkeys(
            ("refusals", "vetoes-by-project", "policy-changes", "errors-by-hour", "dead"),
            "audit_events_exceptions",
        ),
    }
    with filled.connect() as connection:
        given = parameters(connection)
        if connection.dialect.name == "postgresql":
            # A table this small is quicker read as a whole.
            connection.exec_driver_sql("SET enable_seqscan = off")
        for name, index in wanted.items():
            found = QUESTIONS[name].plan(connection, given)
            # PostgreSQL calls a partition's part of an index by its columns.
            parts = {"audit_events_by_key": "api_key_id_request_id", "audit_events_exceptions": "kind_organization"}
            expected = index if connection.dialect.name == "sqlite" else parts[index]
            assert expected in found, f"{name}: {found}"
