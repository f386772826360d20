"""Reading the record by time: an organization's events of a period, a page at a time.

A page goes on after the last event of the page before, so that no transaction stays open between two of them, memory
stays that of one page, and what is recorded in the meantime moves nothing. Events of one instant are in the order of
their names. An event's instant is a little older than its commit: of a period that has only just ended, or has not,
some events may still be to come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.audit.trail import EventName, Row
from tasks.db import Database
from tasks.schema import audit_events

#: Events read at once by what goes through many.
PAGE = 1000
_columns = audit_events.c
_KEY = (_columns.occurred_at, _columns.request_id, _columns.kind, _columns.attempt, _columns.epoch)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of an organization's events are wanted: since `since`, before `until`, and with these values."""

    organization: str
    since: datetime | None = None
    until: datetime | None = None
    kind: str | None = None
    request_id: str | None = None
    agent: str | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """Return what an event must fulfil."""
        wanted = [_columns.organization == self.organization]
        if self.since is not None:
            wanted.append(_columns.occurred_at >= self.since)
        if self.until is not None:
            wanted.append(_columns.occurred_at < self.until)
        columns = {"kind": self.kind, "request_id": self.request_id, "agent_name": self.agent}
        return wanted + [_columns[name] == value for name, value in columns.items() if value is not None]


def find(connection: Connection, organization: str, name: EventName) -> Row | None:
    """Return the event of this name, or None if the organization has none."""
    query = sa.select(audit_events).where(*named(name), _columns.organization == organization)
    return connection.execute(query).mappings().one_or_none()


def named(name: EventName) -> list[sa.ColumnElement[bool]]:
    """Return what the event of this name fulfils, and no other."""
    conditions = [
        _columns.request_id == name.request_id,
        _columns.kind == name.kind,
        _columns.attempt == name.attempt,
    ]
    return conditions if name.epoch is None else [*conditions, _columns.epoch == name.epoch]


def page(
    connection: Connection, selection: Selection, after: Row | None, limit: int, *, newest_first: bool = False
) -> Sequence[Row]:
    """Return up to `limit` of the selected events that follow the event `after`, or the first ones."""
    query = sa.select(audit_events).where(*selection.conditions())
    if after is not None:
        instant = after["occurred_at"]
        mark = sa.tuple_(*(sa.bindparam(None, after[column.name], column.type) for column in _KEY))
        # The first condition says no more than the second; it is one that every planner finds the index by.
        beyond = (
            (_columns.occurred_at <= instant, sa.tuple_(*_KEY) < mark)
            if newest_first
            else (_columns.occurred_at >= instant, sa.tuple_(*_KEY) > mark)
        )
        query = query.where(*beyond)
    order = [column.desc() if newest_first else column.asc() for column in _KEY]
    return connection.execute(query.order_by(*order).limit(limit)).mappings().all()


def pages(database: Database, selection: Selection) -> Iterator[Sequence[Row]]:
    """Yield the selected events, the oldest first, a page at a time. Raises DatabaseUnavailable."""
    last: Row | None = None

    def following(connection: Connection) -> Sequence[Row]:
        return page(connection, selection, last, PAGE)

    while found := database.read(following):
        yield found
        if len(found) < PAGE:
            return
        last = found[-1]


def in_utc(moment: datetime) -> datetime:
    """Return an instant in UTC, held within the years that there are."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        # Its offset leads out of the first or the last year; its own clock's time is close enough.
        return moment.replace(tzinfo=UTC)
