"""What was done to an agent: a `profile_changed` event in the record for each change, in the change's own transaction.

The history that is shown is read from these events, so there is one truth. Drafts change nothing that runs and leave no
event; the versions themselves tell who made them.
"""

from __future__ import annotations

from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from gateway_app.profiles.sealing import Why
from tasks.audit.events import Subject, event, record
from tasks.db import Database
from tasks.ids import new_request_id
from tasks.schema import audit_events

Action = Literal[
    "activated",
    "rolled_back",
    "retired",
    "canary_set",
    "canary_stopped",
    "canary_promoted",
    "pinned",
    "unpinned",
]
KIND = "profile_changed"
#: As a literal, so that the index for this kind is taken.
_KIND: sa.ColumnElement[str] = sa.literal_column(f"'{KIND}'")


def record_change(
    connection: Connection,
    organization: str,
    agent: str,
    why: Why,
    action: Action,
    *,
    before: int | None,
    after: int | None,
    static_profile_hash: str | None = None,
    **more: Any,
) -> None:
    """Record what was done; `before` and `after` are the active versions, or the canaries where it is about them.

    `more` are further details; what is None is left out.
    """
    details = {"action": action, "agent": agent, "from": before, "to": after, "author": why.author}
    details |= {"reason": why.reason, **more}
    subject = Subject(new_request_id(), organization, why.key_id, agent)
    row = event(
        subject,
        KIND,
        profile_version=after,
        static_profile_hash=static_profile_hash,
        details={name: value for name, value in details.items() if value is not None},
    )
    record(connection, row)


class History:
    """Reads changes back."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, organization: str, agent: str, after: str | None, limit: int) -> list[Row[Any]]:
        """Return up to `limit` events of the agent's changes, the newest first, older than the event `after`."""
        events = audit_events.c
        query = sa.select(
            events.request_id, events.occurred_at, events.api_key_id, events.static_profile_hash, events.details
        ).where(events.organization == organization, events.agent_name == agent, events.kind == _KIND)
        if after is not None:
            query = query.where(events.request_id < after)
        query = query.order_by(events.request_id.desc()).limit(limit)
        return self._database.read(lambda connection: list(connection.execute(query)))
