"""Events to read, written as the product writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from gateway_app.audit.trail import EventName
from tasks.audit.events import Subject, event, record
from tasks.db import Database
from tasks.db_engine import create_engine
from tasks.ids import new_request_id
from tasks.schema import audit_events
from tasks.settings import DatabaseGroup

VETO = {
    "reason": "Provider 'openrouter' disallowed for sensitive tasks",
    "policy_violated": "default_local_first",
    "severity": "critical",
    "details": {"policy": "default_local_first"},
}
DECISION = {
    "task_type": "task",
    "sensitivity": "public",
    "provider": "hmcp_gateway",
    "policy": "default_local_first",
    "reason": "auto_recommendation",
}


@contextmanager
def opened(url: str) -> Iterator[Database]:
    """Open the database as the product does."""
    database = Database(DatabaseGroup(url=url))
    try:
        yield database
    finally:
        database.close()


@contextmanager
def engine_of(url: str) -> Iterator[Engine]:
    """Yield an engine for transactions that a test holds open itself."""
    engine = create_engine(DatabaseGroup(url=url))
    try:
        yield engine
    finally:
        engine.dispose()


def subject(organization: str = "acme", agent: str | None = "incident-responder") -> Subject:
    """Return a new request's."""
    return Subject(new_request_id(), organization, "key_0123456789abcdef", agent)


def add(connection: Connection, organization: str = "acme", kind: str = "received", **facts: Any) -> EventName:
    """Record an event of a new request, and return its name."""
    row = event(subject(organization), kind, **facts)
    if "written_in" in row:
        # Otherwise the database's to say.
        connection.execute(sa.insert(audit_events), row)
    else:
        record(connection, row)
    return EventName.of(row)


def fill(database: Database, count: int, *organizations: str, at: datetime | None = None) -> list[EventName]:
    """Record events of the organizations by turns, a transaction each; return their names in that order."""
    whose = organizations or ("acme",)

    def write(whom: str) -> EventName:
        return database.write(lambda connection: add(connection, whom, at=at))

    return [write(whose[number % len(whose)]) for number in range(count)]


def names(database: Database, organization: str | None = None) -> list[EventName]:
    """Return the names of all events there are, of one organization or of all."""
    query = sa.select(audit_events)
    if organization is not None:
        query = query.where(audit_events.c.organization == organization)
    return database.read(lambda connection: [EventName.of(row) for row in connection.execute(query).mappings()])
