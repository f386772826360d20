"""Statements that go around SQLAlchemy's execution do the same, and fail the same way."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from tasks import lifecycle
from tasks.audit.events import Subject, event
from tasks.db_engine import create_engine
from tasks.db_statements import Statement, insertion
from tasks.ids import new_request_id
from tasks.schema import audit_events, requests
from tasks.settings import DatabaseGroup
from tests.tasks.lifecycle.admitted import new_admission

_INSERT = insertion(audit_events)
_BY_ID = Statement(sa.select(requests).where(requests.c.request_id == sa.bindparam("id")))
_RENAME = Statement(
    sa.update(requests)
    .where(requests.c.request_id == sa.bindparam("id"))
    .values(worker="w")
    .returning(requests.c.worker),
    ("agent_name",),
)
_ALL = Statement(sa.select(requests.c.request_id))


@pytest.fixture
def engine(migrated_url: str) -> Iterator[Engine]:
    """Return an engine on a migrated database."""
    engine = create_engine(DatabaseGroup(url=migrated_url))
    yield engine
    engine.dispose()


def _row(connection: Connection, request_id: str) -> Any:
    return connection.execute(sa.select(audit_events).where(audit_events.c.request_id == request_id)).one()


def test_rows_are_as_sqlalchemy_reads_them(engine: Engine) -> None:
    """Every column of a row has the same value and type either way, and is found by its name."""
    admission = new_admission(deadline=datetime(2031, 1, 2, 3, 4, 5, 678, timezone(timedelta(hours=5))))
    with engine.begin() as connection:
        written = lifecycle.admit(connection, admission)
        found = _BY_ID.one(connection, {"id": written.request_id})
        read = connection.execute(sa.select(requests).where(requests.c.request_id == written.request_id)).one()
    assert tuple(written) == tuple(found) == tuple(read)
    assert [type(value) for value in found] == [type(value) for value in read]
    assert list(found._fields) == list(read._fields)
    assert found.deadline == datetime(2031, 1, 1, 22, 4, 5, 678, UTC)


def test_what_is_left_out_is_null(engine: Engine) -> None:
    """Also a document, for which None would be JSON's null; what is given is converted as its column wants."""
    given = {"numbers": [1, 2.5], "text": "ü"}
    without, given_one = new_request_id(), new_request_id()
    with engine.begin() as connection:
        rows = [
            event(Subject(without, "acme", "key_1"), "received"),
            event(Subject(given_one, "acme", "key_1"), "received", details=given),
        ]
        _INSERT.run_each(connection, rows)
        nulls = sa.select(audit_events.c.request_id).where(audit_events.c.details.is_(sa.null()))
        assert without in connection.execute(nulls).scalars().all()
        assert _row(connection, given_one).details == given


def test_own_values_and_columns(engine: Engine) -> None:
    """A statement's own values hold, columns take what is given, and what it changed is counted or returned."""
    with engine.begin() as connection:
        request_id = lifecycle.admit(connection, new_admission()).request_id
        assert _RENAME.one(connection, {"id": request_id, "agent_name": "other"}).worker == "w"
        row = _BY_ID.one(connection, {"id": request_id})
        assert (row.worker, row.agent_name) == ("w", "other")
        assert _BY_ID.one_or_none(connection, {"id": "none"}) is None
        with pytest.raises(sa.exc.NoResultFound):
            _BY_ID.one(connection, {"id": "none"})


def test_more_rows_than_one(engine: Engine) -> None:
    """Who asks for one row and gets two is told."""
    with engine.begin() as connection:
        for _ in range(2):
            lifecycle.admit(connection, new_admission())
        with pytest.raises(sa.exc.MultipleResultsFound):
            _ALL.one_or_none(connection, {})


def test_a_parameter_that_is_missing(engine: Engine) -> None:
    """It is not taken for NULL."""
    with engine.connect() as connection, pytest.raises(KeyError):
        _BY_ID.one_or_none(connection, {})


def test_a_parameter_that_is_unknown(engine: Engine) -> None:
    """It is not left out without a word: an event would lack what it was to hold. Its value is not told."""
    with engine.connect() as connection:
        with pytest.raises(TypeError, match=r"no agentname$"):
            _INSERT.run_each(
                connection, [{**event(Subject(new_request_id(), "acme", "k"), "received"), "agentname": "x"}]
            )
        with pytest.raises(TypeError, match=r"no other$"):
            _BY_ID.one_or_none(connection, {"id": "any", "other": "x"})


def test_defaults_are_the_databases(engine: Engine) -> None:
    """What has one is left to it."""
    with engine.begin() as connection:
        row = lifecycle.admit(connection, new_admission())
        assert row.excused == 0
        with pytest.raises(TypeError, match=r"no written_in$"):
            _INSERT.run_each(connection, [{**event(Subject(row.request_id, "acme", "k"), "started"), "written_in": 1}])


def test_it_begins_a_transaction(engine: Engine) -> None:
    """Where none has begun, as SQLAlchemy's own statements do; alone it begins none."""
    with engine.connect() as connection:
        request_id = lifecycle.admit(connection, new_admission()).request_id
        connection.commit()
    with engine.connect() as connection:
        assert _BY_ID.alone(connection, {"id": request_id}) is not None
        assert not connection.in_transaction()
        assert _BY_ID.one_or_none(connection, {"id": request_id}) is not None
        assert connection.in_transaction()


def test_errors_are_sqlalchemys_and_hide_values(engine: Engine) -> None:
    """What a constraint refuses is an IntegrityError without the row in its text, and the connection goes on."""
    row = event(Subject(new_request_id(), "acme", "key_secret"), "received")
    with engine.connect() as connection:
        with connection.begin():
            _INSERT.run_each(connection, [row])
        with pytest.raises(sa.exc.IntegrityError) as raised, connection.begin():
            _INSERT.run_each(connection, [row])
        assert (raised.value.statement, raised.value.params) == (None, None)
        assert not connection.invalidated
        with pytest.raises(sa.exc.ProgrammingError if engine.dialect.name == "postgresql" else sa.exc.OperationalError):
            Statement(sa.select(sa.column("x")).select_from(sa.table("nowhere"))).alone(connection, {})


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_a_connection_that_is_lost(engine: Engine) -> None:
    """It is noticed, as SQLAlchemy notices it, so that nobody gets the connection again."""
    with engine.connect() as connection, engine.connect() as other:
        connection.begin()
        pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        other.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        with pytest.raises(sa.exc.OperationalError) as raised:
            _BY_ID.one_or_none(connection, {"id": "any"})
        assert raised.value.connection_invalidated
        assert connection.invalidated
