"""The record can only be added to, by whatever statement somebody tries, and it says once how each request ended."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tasks import lifecycle
from tasks.audit.events import Subject, ciphertext_hash, event, record
from tasks.db_engine import create_engine
from tasks.ids import new_request_id
from tasks.job import Piece, Result, Timings, Usage
from tasks.migrating import upgrade
from tasks.schema import KINDS, TERMINAL_KINDS, audit_events
from tasks.settings import DatabaseGroup
from tests.services import PostgresServer

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(
    request: pytest.FixtureRequest, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Return an engine on a migrated database, which all tests here share: the record cannot be emptied."""
    if request.param == "sqlite":
        url = f"sqlite:///{shutil.copy(sqlite_template, tmp_path_factory.mktemp('record'))}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.migrated_url(upgrade)
    engine = create_engine(DatabaseGroup(url=url))
    yield engine
    engine.dispose()


def new_subject(**changes: str) -> Subject:
    """Return whom a new request is about."""
    return Subject(**{"request_id": new_request_id(), "organization": "acme", "api_key_id": "key_1", **changes})


def add(engine: Engine, *events: dict[str, Any]) -> None:
    """Record events in a transaction of their own."""
    with engine.begin() as connection:
        record(connection, *events)


def rows(engine: Engine) -> list[tuple[Any, ...]]:
    """Return the whole record."""
    query = sa.select(audit_events).order_by(audit_events.c.request_id, audit_events.c.kind, audit_events.c.attempt)
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(query)]


# --- Nothing is changed ---------------------------------------------------------------------------

_COLUMNS = "request_id, kind, attempt, epoch, occurred_at, organization, api_key_id"
TAMPERING = {
    "update": "UPDATE audit_events SET reason = 'forged'",
    "update of nothing new": "UPDATE audit_events SET kind = kind WHERE kind = 'received'",
    "update of a key": "UPDATE audit_events SET attempt = attempt + 100",
    "delete": "DELETE FROM audit_events",
    "delete one": "DELETE FROM audit_events WHERE kind = 'completed'",
    "insert or update": f"INSERT INTO audit_events ({_COLUMNS}) SELECT {_COLUMNS} FROM audit_events"
    " WHERE kind = 'received'"
    " ON CONFLICT (request_id, kind, attempt, epoch) DO UPDATE SET reason = 'forged'",
}
TAMPERING_SQLITE = {
    "replace": f"INSERT OR REPLACE INTO audit_events ({_COLUMNS}, reason)"
    f" SELECT {_COLUMNS}, 'forged' FROM audit_events WHERE kind = 'received'",
    "replace, in short": f"REPLACE INTO audit_events ({_COLUMNS}, reason)"
    f" SELECT {_COLUMNS}, 'forged' FROM audit_events WHERE kind = 'completed'",
    "update or replace": "UPDATE OR REPLACE audit_events SET kind = 'received' WHERE kind = 'admitted'",
    "replace the terminal event by another": f"INSERT OR REPLACE INTO audit_events ({_COLUMNS})"
    " SELECT request_id, 'failed', attempt, epoch, occurred_at, organization, api_key_id"
    " FROM audit_events WHERE kind = 'completed'",
    "replace by row number": f"INSERT OR REPLACE INTO audit_events (rowid, {_COLUMNS})"
    " SELECT rowid, request_id, 'started', 99, epoch, occurred_at, organization, api_key_id"
    " FROM audit_events WHERE kind = 'received'",
}
TAMPERING_POSTGRES = {
    "truncate": "TRUNCATE audit_events",
    "truncate everything": "TRUNCATE audit_events, requests, profiles CASCADE",
    "truncate a partition": "TRUNCATE audit_events_{month}",
    "truncate the default partition": "TRUNCATE audit_events_rest",
    "truncate only the parent": "TRUNCATE ONLY audit_events_{month}",
    "update a partition": "UPDATE audit_events_{month} SET reason = 'forged'",
    "delete from a partition": "DELETE FROM audit_events_{month}",
    "merge": "MERGE INTO audit_events a USING requests r ON true WHEN NOT MATCHED BY SOURCE THEN DELETE",
}


def _history(subject: Subject) -> list[dict[str, Any]]:
    kinds = ("received", "admitted", "started", "completed")
    return [event(subject, kind, attempt=int(kind in ("started", "completed")), epoch=1) for kind in kinds]


def _refused(engine: Engine, statement: str) -> None:
    """Check that a statement fails on the ground that the record is insert-only, and that nothing has changed."""
    add(engine, *_history(new_subject()), *_history(new_subject()))
    before = rows(engine)
    with pytest.raises(sa.exc.DBAPIError, match="insert-only"), engine.begin() as connection:
        connection.exec_driver_sql(statement.format(month=f"{datetime.now(UTC):%Y_%m}"))
    assert rows(engine) == before


@pytest.mark.parametrize("name", TAMPERING)
def test_the_record_is_not_changed(engine: Engine, name: str) -> None:
    """By no statement that both databases know."""
    _refused(engine, TAMPERING[name])


@pytest.mark.parametrize("name", TAMPERING_SQLITE)
@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_the_record_is_not_changed_on_sqlite(engine: Engine, name: str) -> None:
    """By no statement that SQLite alone knows: REPLACE deletes rows without telling triggers."""
    _refused(engine, TAMPERING_SQLITE[name])


@pytest.mark.parametrize("name", TAMPERING_POSTGRES)
@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_the_record_is_not_changed_on_postgresql(engine: Engine, name: str) -> None:
    """By no statement that PostgreSQL alone knows, on the table or on one of its partitions."""
    _refused(engine, TAMPERING_POSTGRES[name])


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_every_partition_is_guarded(engine: Engine) -> None:
    """Not only the current one: each has the triggers for rows, and one of its own for TRUNCATE."""
    query = sa.text(
        "SELECT inhrelid::regclass::text, count(tgname) FROM pg_inherits LEFT JOIN pg_trigger ON tgrelid = inhrelid"
        " WHERE inhparent = 'audit_events'::regclass GROUP BY 1"
    )
    with engine.connect() as connection:
        counts = {row[0]: row[1] for row in connection.execute(query)}
    assert len(counts) >= 25
    assert set(counts.values()) == {2}


# --- Nothing is recorded twice --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_event_twice(engine: Engine, kind: str) -> None:
    """At-least-once delivery becomes exactly-once effect: the second time fails, whatever else it says."""
    subject = new_subject()
    add(engine, event(subject, kind, attempt=1, epoch=1))
    before = rows(engine)
    for again in (event(subject, kind, attempt=1, epoch=1), event(subject, kind, attempt=1, epoch=1, reason="x")):
        with pytest.raises(sa.exc.DBAPIError):
            add(engine, event(new_subject(), "received"), again)
    assert rows(engine) == before
    add(engine, event(new_subject(), kind, attempt=1, epoch=1))


def test_an_event_of_each_attempt_and_epoch(engine: Engine) -> None:
    """What is no terminal event may be recorded for every attempt, and each time that Redis loses the message of one."""
    subject = new_subject()
    add(engine, *(event(subject, "started", attempt=number, epoch=1) for number in range(1, 6)))
    add(engine, *(event(subject, "requeued", attempt=5, epoch=epoch) for epoch in range(1, 4)))
    assert len([row for row in rows(engine) if row[0] == subject.request_id]) == 8


def test_a_second_terminal_event(engine: Engine) -> None:
    """For every pair of terminal kinds, in either order, of the same attempt or of another: the first one stays."""
    for first, second in itertools.product(TERMINAL_KINDS, repeat=2):
        for attempt in (1, 2):
            subject = new_subject()
            add(engine, event(subject, first, attempt=1, epoch=1))
            with pytest.raises(sa.exc.IntegrityError):
                add(engine, event(subject, second, attempt=attempt, epoch=attempt))
            with engine.connect() as connection:
                query = sa.select(audit_events.c.kind).where(audit_events.c.request_id == subject.request_id)
                assert connection.execute(query).scalars().all() == [first]


@pytest.mark.parametrize("kind", ["nonsense", "", "Completed", "completed ", "queued", "running"])
def test_an_unknown_kind(engine: Engine, kind: str) -> None:
    """Whatever isn't in the list can't be recorded: least of all a terminal event that no index sees."""
    before = rows(engine)
    with pytest.raises(sa.exc.IntegrityError):
        add(engine, event(new_subject(), kind))
    assert rows(engine) == before


@pytest.mark.parametrize("column", ["organization", "api_key_id", "occurred_at", "epoch", "request_id", "attempt"])
def test_what_an_event_must_say(engine: Engine, column: str) -> None:
    """No event is without whom it is about, and when."""
    with pytest.raises((sa.exc.IntegrityError, sa.exc.StatementError)):
        add(engine, {**event(new_subject(), "received"), column: None})


def test_an_event_comes_back_as_it_was(engine: Engine) -> None:
    """Times with their zone, details as JSON, on both databases alike."""
    subject = new_subject(agent_name="incident-responder")
    at = NOON + timedelta(microseconds=123456)
    details: dict[str, Any] = {
        "veto": {"policy": "compliance_local_only"},
        "list": [],
        "text": "ü \u2028 😀",
        "nothing": None,
    }
    add(engine, event(subject, "vetoed", at=at, details=details, queued_ms=0.125, code="policy_veto"))
    with engine.connect() as connection:
        row = connection.execute(sa.select(audit_events).where(audit_events.c.request_id == subject.request_id)).one()
    assert (row.occurred_at, row.details, row.queued_ms, row.code) == (at, details, 0.125, "policy_veto")
    assert (row.request_id, row.organization, row.agent_name) == (subject.request_id, "acme", "incident-responder")


def test_a_time_without_a_zone(engine: Engine) -> None:
    """It would be read as local time; it is refused."""
    with pytest.raises(ValueError, match="time zone"):
        add(engine, event(new_subject(), "received", at=NOON.replace(tzinfo=None)))


def test_ciphertext_hash() -> None:
    """SHA-256, in hexadecimal: what anybody can recompute from the stored payload."""
    assert ciphertext_hash(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- The view -------------------------------------------------------------------------------------

RESULT = Result(
    pieces=(Piece(text="Reboot it."),),
    finish_reasons=("stop",),
    model="tiny",
    usage=Usage(prompt_tokens=700, cached_tokens=640, output_tokens=5),
    timings=Timings(queued_ms=1.5, prefill_ms=20.25, first_token_ms=30.5, total_ms=99.75),
)
DECISION = {
    "profile_version": 3,
    "task_type": "triage",
    "sensitivity": "private",
    "provider": "local",
    "policy": "default_local_first",
    "project_id": "proj_1",
    "artifact_id": "art_1",
    "task_id": "task_1",
}


def _admit(engine: Engine, subject: Subject) -> None:
    columns = {"api": "tasks", "priority": "normal", "deadline": None}
    admission = lifecycle.Admission(subject, DECISION, "ab" * 32, b"wrapped", b"payload", columns)
    with engine.begin() as connection:
        lifecycle.admit(connection, admission)


def _start(engine: Engine, subject: Subject, worker: str) -> lifecycle.Attempt:
    with engine.begin() as connection:
        started = lifecycle.start(connection, subject.request_id, lifecycle.FIRST_EPOCH, worker, 3)
    assert isinstance(started, lifecycle.Attempt)
    return started


def _summary(engine: Engine, subject: Subject) -> dict[str, Any]:
    """Return the view's row of a request, having checked that there is one."""
    with engine.connect() as connection:
        query = sa.text("SELECT * FROM audit_requests WHERE request_id = :id")
        return dict(connection.execute(query, {"id": subject.request_id}).mappings().one())


def _times(engine: Engine, subject: Subject) -> dict[str, Any]:
    """Return when each event of a request was recorded, in the database's own form, by kind and attempt."""
    query = sa.text("SELECT kind, attempt, occurred_at FROM audit_events WHERE request_id = :id")
    with engine.connect() as connection:
        return {
            f"{row.kind} {row.attempt}": row.occurred_at
            for row in connection.execute(query, {"id": subject.request_id})
        }


def test_view_of_a_request_completed_after_two_attempts(engine: Engine) -> None:
    """One row with all that was decided and measured; the times are those of the first start and of the end."""
    subject = new_subject(agent_name="incident-responder")
    _admit(engine, subject)
    _start(engine, subject, "gpu-1")
    attempt = _start(engine, subject, "gpu-2")
    with engine.begin() as connection:
        assert lifecycle.answer(connection, attempt, RESULT, b"sealed")
    times = _times(engine, subject)
    assert _summary(engine, subject) == {
        "request_id": subject.request_id,
        "organization": "acme",
        "api_key_id": "key_1",
        "agent_name": "incident-responder",
        **DECISION,
        "static_profile_hash": "ab" * 32,
        "received_at": times["received 0"],
        "admitted_at": times["admitted 0"],
        "started_at": times["started 1"],
        "finished_at": times["completed 2"],
        "outcome": "completed",
        "code": None,
        "attempts": 2,
        "worker": "gpu-2",
        "model": "tiny",
        **RESULT.usage.model_dump(),
        **RESULT.timings.model_dump(),
    }


def test_view_names_the_worker_that_answered(engine: Engine) -> None:
    """Names don't order as attempts do: the answer of the second attempt is the second worker's."""
    subject = new_subject(agent_name="incident-responder")
    _admit(engine, subject)
    _start(engine, subject, "gpu-2")
    attempt = _start(engine, subject, "gpu-1")
    with engine.begin() as connection:
        assert lifecycle.answer(connection, attempt, RESULT, b"sealed")
    assert _summary(engine, subject)["worker"] == "gpu-1"


@pytest.mark.parametrize("state", ["cancelled", "expired"])
def test_view_of_a_request_that_was_stopped(engine: Engine, state: Literal["cancelled", "expired"]) -> None:
    """What it cost until then is in the record, like that of one which came to its end, and why it did not."""
    subject = new_subject(agent_name="incident-responder")
    _admit(engine, subject)
    attempt = _start(engine, subject, "gpu-1")
    partial = RESULT.model_copy(update={"finish_reasons": ()})
    with engine.begin() as connection:
        assert lifecycle.answer(connection, attempt, partial, b"sealed", state)
    found = _summary(engine, subject)
    assert (found["outcome"], found["code"], found["worker"]) == (state, state, "gpu-1")
    assert (found["model"], found["output_tokens"], found["total_ms"]) == ("tiny", 5, 99.75)


def test_view_of_a_vetoed_request(engine: Engine) -> None:
    """Received and ended in the same moment, with the policy that did it, and no attempt."""
    subject = new_subject(agent_name="incident-responder")
    with engine.begin() as connection:
        lifecycle.refuse(connection, subject, "vetoed", "policy_veto", {"policy": "compliance_local_only"})
    found = _summary(engine, subject)
    assert (found["outcome"], found["code"], found["policy"]) == ("vetoed", "policy_veto", "compliance_local_only")
    assert found["received_at"] <= found["finished_at"]
    assert (found["attempts"], found["admitted_at"], found["started_at"], found["worker"]) == (0, None, None, None)


def test_view_of_a_refused_request(engine: Engine) -> None:
    """A request that was not valid: received and failed, with its code; nothing is known of an agent."""
    subject = new_subject()
    with engine.begin() as connection:
        lifecycle.refuse(connection, subject, "failed", "invalid_request", {})
    found = _summary(engine, subject)
    assert (found["outcome"], found["code"], found["agent_name"]) == ("failed", "invalid_request", None)
    assert found["attempts"] == 0


def test_view_of_a_running_request(engine: Engine) -> None:
    """It has begun and has no outcome yet."""
    subject = new_subject(agent_name="incident-responder")
    _admit(engine, subject)
    _start(engine, subject, "gpu-1")
    found = _summary(engine, subject)
    assert (found["outcome"], found["finished_at"], found["code"]) == (None, None, None)
    assert (found["attempts"], found["worker"]) == (1, "gpu-1")
    assert found["started_at"] is not None


def test_view_has_one_row_a_request(engine: Engine) -> None:
    """However many events there are, and none mixes with another's."""
    subjects = [new_subject(organization=name, agent_name="a") for name in ("acme", "globex", "initech")]
    for number, subject in enumerate(subjects):
        _admit(engine, subject)
        for attempt in range(number):
            _start(engine, subject, f"gpu-{attempt}")
    with engine.connect() as connection:
        query = sa.text(
            "SELECT request_id, organization, attempts FROM audit_requests WHERE request_id >= :first ORDER BY 1"
        )
        found = [tuple(row) for row in connection.execute(query, {"first": subjects[0].request_id})]
    assert found == [(subject.request_id, subject.organization, number) for number, subject in enumerate(subjects)]
