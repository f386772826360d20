"""Attempts that end without an answer: the request is queued again, or dead where it was the last one.

Attempts that ended by no fault of the request (its worker was stopped, the queue lost it) are excused: they count in the
attempt's number, which only grows, but not against `max_attempts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.audit.events import event, record
from tasks.db import now
from tasks.errors import AttemptsExhausted
from tasks.lifecycle.ending import end, end_if_unwanted
from tasks.lifecycle.rows import Attempt, carries, locked
from tasks.schema import TERMINAL_STATES, audit_events, requests

GivenBack = Literal["queued", "dead", "cancelled", "expired", "fenced"]
_ENDS_WITHOUT_ANSWER: Mapping[str, GivenBack] = {"dead": "dead", "cancelled": "cancelled", "expired": "expired"}


def give_back(
    connection: Connection, attempt: Attempt, code: str, *, delay_s: float = 0.0, max_attempts: int | None
) -> GivenBack:
    """Record that the attempt ended without an answer, for the reason `code`; return what became of the request.

    `queued`: it runs again, not before `delay_s` from now. `dead`: that was the last of `max_attempts`; None excuses the
    attempt, and always queues. `cancelled`, `expired`: nobody waits for it any more. `fenced`: it is another's now, or
    has been answered. Saying the same again, after a commit whose answer was lost, changes nothing and returns the same,
    or how the request has ended since.
    """
    row = locked(connection, attempt.subject.request_id)
    if row is None or not carries(row, attempt):
        return "queued" if _gave_back(connection, attempt) else "fenced"
    if row.state == "queued":
        return "queued"
    if row.state in TERMINAL_STATES:
        return _ENDS_WITHOUT_ANSWER.get(row.state, "fenced")
    if (unwanted := end_if_unwanted(connection, row)) is not None:
        return unwanted
    if max_attempts is not None and row.attempt - row.excused >= max_attempts:
        end(connection, attempt, "dead", code=AttemptsExhausted.code, details={"last_code": code})
        return "dead"
    at = now()
    queue_again(connection, attempt, excused=max_attempts is None, not_before=at + timedelta(seconds=delay_s))
    record(connection, event(attempt.subject, "requeued", at=at, code=code, **_names(attempt)))
    return "queued"


def queue_again(
    connection: Connection, attempt: Attempt, *, excused: bool, not_before: datetime | None, **columns: Any
) -> None:
    """Make the locked row of an attempt that has ended a queued one; `columns` are further ones that change."""
    connection.execute(
        sa.update(requests)
        .where(requests.c.request_id == attempt.subject.request_id)
        .values(state="queued", excused=requests.c.excused + int(excused), not_before=not_before, **columns)
    )


def _gave_back(connection: Connection, attempt: Attempt) -> bool:
    """Tell whether the attempt is recorded as given back."""
    query = sa.select(sa.literal(1)).where(
        audit_events.c.request_id == attempt.subject.request_id,
        audit_events.c.kind == "requeued",
        audit_events.c.attempt == attempt.number,
        audit_events.c.epoch == attempt.epoch,
    )
    return connection.execute(query).scalar() is not None


def _names(attempt: Attempt) -> dict[str, Any]:
    return {"attempt": attempt.number, "epoch": attempt.epoch, "worker": attempt.worker}
