"""Requests and their events as operators ask for them: whoever they belong to, and never with their text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.schema import TERMINAL_STATES, audit_events, requests

#: What is shown of a request and of an event.
REQUEST = (
    *("request_id", "organization", "api_key_id", "agent_name", "api", "priority", "state", "error_code"),
    *("epoch", "attempt", "excused", "worker", "created_at", "published_at", "not_before", "deadline", "finished_at"),
)
EVENT = ("kind", "occurred_at", "attempt", "epoch", "code", "worker")
#: The few kinds of events that such a state comes with: they have an index, which the states have not.
_RARE: Mapping[str, tuple[str, ...]] = {"dead": ("dead",), "failed": ("failed", "vetoed")}


def page(connection: Connection, state: str | None, organization: str | None, limit: int) -> list[Row[Any]]:
    """Return up to `limit` requests, the newest first, in this state and of this organization if they are given."""
    query = sa.select(*(requests.c[name] for name in REQUEST))
    if organization is not None:
        query = query.where(requests.c.organization == organization)
    if state is not None:
        query = query.where(requests.c.state == state)
        if state in _RARE:
            # As literals: a partial index is used only where the statement itself shows that it may be.
            kinds = [audit_events.c.kind == sa.literal_column(f"'{kind}'") for kind in _RARE[state]]
            query = query.where(requests.c.request_id.in_(sa.select(audit_events.c.request_id).where(sa.or_(*kinds))))
        elif state not in TERMINAL_STATES:
            query = query.where(requests.c.finished_at.is_(None))
    return list(connection.execute(query.order_by(requests.c.request_id.desc()).limit(limit)))


def find(connection: Connection, request_id: str) -> Row[Any] | None:
    """Return the whole row of a request, or None if there is none."""
    return connection.execute(sa.select(requests).where(requests.c.request_id == request_id)).one_or_none()


def events(connection: Connection, request_id: str) -> list[dict[str, Any]]:
    """Return the events of a request in order, with the id of the request that it repeats where it does."""
    query = sa.select(*(audit_events.c[name] for name in EVENT), audit_events.c.details)
    query = query.where(audit_events.c.request_id == request_id).order_by(audit_events.c.occurred_at)
    found = []
    for row in connection.execute(query).mappings():
        event = {name: row[name] for name in EVENT}
        if row["details"] and "retry_of" in row["details"]:
            event["retry_of"] = row["details"]["retry_of"]
        found.append(event)
    return found
