"""Reading the record in the order of its commits, without gaps: what a follower does.

On PostgreSQL a row tells which transaction wrote it. Transactions end in any order, so a row may appear behind one that
was already read; but not behind the oldest transaction that still runs. Rows are read below that one only, ordered by
their transaction and then their name. On SQLite there is one writer at a time, and row numbers are that order.

The place that was reached is the name of the last event read. A name is found again whatever becomes of row numbers,
and if it is not there, the database is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.audit.events import named
from gateway_app.audit.trail import EventName, Row
from tasks.errors import FollowRefused
from tasks.schema import audit_events

_columns = audit_events.c
_KEY = (_columns.written_in, _columns.request_id, _columns.kind, _columns.attempt, _columns.epoch)
_ROW_NUMBER = sa.literal_column("audit_events.rowid", sa.BigInteger)
#: The oldest transaction that runs, the next one to begin, and the newest one of which there is a row, of one instant.
_HORIZON = sa.text("""
    SELECT pg_snapshot_xmin(now.snapshot)::text::bigint AS oldest, pg_snapshot_xmax(now.snapshot)::text::bigint AS next,
        (SELECT written_in FROM audit_events ORDER BY written_in DESC LIMIT 1) AS newest
    FROM (SELECT pg_current_snapshot() AS snapshot) AS now
""")


@dataclass(frozen=True, slots=True)
class Commits:
    """Events in the order of their commits. `held_back` tells that there are more, behind a transaction that runs."""

    rows: Sequence[Row]
    held_back: bool = False


def after(connection: Connection, last: EventName | None, limit: int) -> Commits:
    """Return up to `limit` events that follow the event `last`, or the first ones of the record.

    The same call returns the same events, at any later time, as far as they were there. Raises FollowRefused if the
    record does not hold `last`, or if its order cannot be relied on.
    """
    if connection.dialect.name == "sqlite":
        query = sa.select(audit_events)
        if last is not None:
            query = query.where(_place(connection, [_ROW_NUMBER], last)[0] < _ROW_NUMBER)
        return Commits(_rows(connection, query.order_by(_ROW_NUMBER).limit(limit)))
    horizon = connection.execute(_HORIZON).one()
    newest = horizon.newest or 0
    if newest >= horizon.next:
        raise FollowRefused(
            f"the record holds events of transaction {newest}, and the next transaction of this PostgreSQL is "
            f"{horizon.next}: it was restored from another one that had counted further"
        )
    query = sa.select(audit_events).where(_columns.written_in < horizon.oldest)
    if last is not None:
        place = _place(connection, list(_KEY), last)
        mark = sa.tuple_(*(sa.bindparam(None, value, column.type) for value, column in zip(place, _KEY, strict=True)))
        query = query.where(_columns.written_in >= place[0], sa.tuple_(*_KEY) > mark)
    rows = _rows(connection, query.order_by(*_KEY).limit(limit))
    return Commits(rows, held_back=len(rows) < limit and newest >= horizon.oldest)


def _rows(connection: Connection, query: sa.Select[Any]) -> list[Row]:
    return list(connection.execute(query).mappings())


def _place(connection: Connection, columns: Sequence[sa.ColumnElement[Any]], name: EventName) -> Sequence[Any]:
    """Return these columns of the event of this name."""
    query = sa.select(*columns).select_from(audit_events).where(*named(name))
    row = connection.execute(query).one_or_none()
    if row is None:
        raise FollowRefused(f"the record does not hold {name}, the event that was followed last: it is another record")
    return row
