"""Reading requests: nothing here changes one. `tasks/lifecycle/` has the functions that do."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.db import Database
from tasks.db_statements import Statement
from tasks.schema import audit_events, requests

_FIND = Statement(
    sa.select(requests).where(
        requests.c.request_id == sa.bindparam("request_id"), requests.c.organization == sa.bindparam("organization")
    )
)


def find(connection: Connection, request_id: str, organization: str) -> Row[Any] | None:
    """Return the request's row, or None if this organization has no such request."""
    return _FIND.one_or_none(connection, {"request_id": request_id, "organization": organization})


def existing(connection: Connection, request_id: str, organization: str) -> Row[Any]:
    """Return the row of a request that there is. Raises NoResultFound."""
    return _FIND.one(connection, {"request_id": request_id, "organization": organization})


def found(database: Database, request_id: str, organization: str) -> Row[Any] | None:
    """Return the same, of what is committed. Raises DatabaseUnavailable."""
    return database.row(_FIND, {"request_id": request_id, "organization": organization})


def page(
    connection: Connection, organization: str, filters: Mapping[str, Any], after: str | None, limit: int
) -> list[Row[Any]]:
    """Return up to `limit` requests of the organization, the newest first, older than `after` if that is given."""
    query = sa.select(requests).where(requests.c.organization == organization)
    query = query.where(*(requests.c[name] == value for name, value in filters.items()))
    if after is not None:
        query = query.where(requests.c.request_id < after)
    return list(connection.execute(query.order_by(requests.c.request_id.desc()).limit(limit)))


def to_stop(connection: Connection, request_ids: Collection[str]) -> list[str]:
    """Return which of these running requests somebody cancelled."""
    query = sa.select(requests.c.request_id).where(
        requests.c.request_id.in_(request_ids), requests.c.cancel_requested_at.is_not(None)
    )
    return list(connection.execute(query).scalars())


def veto_of(connection: Connection, request_id: str) -> Mapping[str, Any] | None:
    """Return the veto object that a request ended with, if it did."""
    query = sa.select(audit_events.c.details).where(
        audit_events.c.request_id == request_id, audit_events.c.kind == "vetoed"
    )
    held = connection.execute(query).scalar()
    return held.get("veto") if held else None


def lost_attempt(connection: Connection, request_id: str, number: int) -> Row[Any] | None:
    """Return the event with which an attempt before the last one began, if no event says that it was given back."""
    given_back = sa.select(sa.literal(1)).where(
        audit_events.c.request_id == request_id, audit_events.c.kind == "requeued", audit_events.c.attempt == number
    )
    query = sa.select(audit_events).where(
        audit_events.c.request_id == request_id,
        audit_events.c.kind == "started",
        audit_events.c.attempt == number,
        ~given_back.exists(),
    )
    return connection.execute(query).one_or_none()
