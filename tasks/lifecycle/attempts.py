"""A worker's first and last step with a request: beginning the next attempt, and recording its answer.

An attempt whose worker was lost says nothing any more. The next one begins over it, raises the attempt's number and so
fences it off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.audit.events import ciphertext_hash, event, record
from tasks.db import now
from tasks.db_statements import Statement
from tasks.errors import AttemptsExhausted
from tasks.job import Result
from tasks.lifecycle.ending import end, end_if_unwanted, finish
from tasks.lifecycle.rows import SUBJECT, Attempt, last_attempt, locked, subject_of
from tasks.schema import TERMINAL_STATES, requests

#: What is recorded of a last attempt that never told how it ended.
WORKER_LOST = "worker_lost"
_BEGIN = Statement(
    sa.update(requests)
    .where(
        requests.c.request_id == sa.bindparam("id"),
        requests.c.epoch == sa.bindparam("of_epoch"),
        requests.c.finished_at.is_(None),
        requests.c.attempt - requests.c.excused < sa.bindparam("max_attempts"),
        requests.c.cancel_requested_at.is_(None),
        sa.or_(requests.c.deadline.is_(None), requests.c.deadline > sa.bindparam("at")),
    )
    .values(state="running", attempt=requests.c.attempt + 1, worker=sa.bindparam("by"), not_before=None)
    .returning(*SUBJECT, requests.c.attempt, requests.c.deadline)
)


@dataclass(frozen=True, slots=True)
class NotStarted:
    """Why a message leads to no attempt. `state` is the request's, or None if there is no such request.

    `attempt` and `code` are those of the last attempt, for telling watchers again how the request ended; `answered`
    tells whether there is text of it to be read from the database.
    """

    state: str | None
    attempt: int = 0
    code: str | None = None
    answered: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request that waits must not run any more: the kind and code of its last event, and further columns of it."""

    kind: Literal["vetoed", "failed"]
    code: str
    facts: Mapping[str, Any]


def start(
    connection: Connection,
    request_id: str,
    epoch: int,
    worker: str,
    max_attempts: int,
    refusal: Refusal | None = None,
    details: Mapping[str, Any] | None = None,
) -> Attempt | NotStarted:
    """Begin the next attempt. A request that was cancelled, is too late or used all its attempts is ended instead.

    So is one with a `refusal`, if nothing else ends it. `details` are kept in the attempt's event.
    """
    begun = None if refusal else _begin(connection, request_id, epoch, worker, max_attempts)
    if begun is None and not _ended_instead(connection, request_id, epoch, max_attempts, refusal):
        # Where it may begin now, it was given back, and excused, in the moment before its row was locked.
        begun = _begin(connection, request_id, epoch, worker, max_attempts)
    if begun is not None:
        attempt = Attempt(subject_of(begun), epoch, begun.attempt, worker, begun.deadline)
        facts: dict[str, Any] = {"details": dict(details)} if details else {}
        record(
            connection, event(attempt.subject, "started", attempt=attempt.number, epoch=epoch, worker=worker, **facts)
        )
        return attempt
    row = locked(connection, request_id)
    return NotStarted(None) if row is None else NotStarted(row.state, row.attempt, row.error_code, row.answered)


def _ended_instead(
    connection: Connection, request_id: str, epoch: int, max_attempts: int, refusal: Refusal | None
) -> bool:
    """End the request if it must not begin, and tell whether nothing is left to begin."""
    row = locked(connection, request_id)
    if row is None or row.state in TERMINAL_STATES or row.epoch != epoch:
        return True
    if end_if_unwanted(connection, row) is not None:
        return True
    last = last_attempt(row)
    if row.attempt - row.excused >= max_attempts:
        # Whoever fails at the last attempt says so itself: where it still runs, it was never heard of again. Where it
        # waits, fewer attempts are allowed now than when it was given back.
        details = {"last_code": WORKER_LOST} if row.state == "running" else None
        end(connection, last, "dead", code=AttemptsExhausted.code, details=details)
    elif refusal is not None:
        end(connection, last, "failed", kind=refusal.kind, code=refusal.code, **refusal.facts)
    else:
        return False
    return True


def _begin(connection: Connection, request_id: str, epoch: int, worker: str, max_attempts: int) -> Row[Any] | None:
    """Return the row of a request that may begin another attempt, and has."""
    names = {"id": request_id, "of_epoch": epoch, "max_attempts": max_attempts, "at": now(), "by": worker}
    return _BEGIN.one_or_none(connection, names)


def answer(
    connection: Connection,
    attempt: Attempt,
    result: Result,
    sealed: bytes,
    state: Literal["completed", "cancelled", "expired"] = "completed",
) -> bool:
    """Record what the model said and store it sealed; `state` tells whether it said all that it was going to.

    Returns False if the attempt was fenced off; then nothing changed.
    """
    return finish(
        connection,
        attempt,
        state,
        code=None if state == "completed" else state,
        result=sealed,
        payload_sha256=ciphertext_hash(sealed),
        model=result.model,
        **result.usage.model_dump(),
        **result.timings.model_dump(),
        details={"finish_reason": result.finish_reason},
    )
