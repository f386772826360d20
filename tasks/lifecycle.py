"""A request's states, and the only code that changes them.

    received ──▶ vetoed | failed                     refused: recorded, never queued
        └──▶ queued ──▶ running ──▶ completed | failed | cancelled | expired
                │         ▲  │
                │         └──┘ another attempt, after its worker was lost
                └──▶ failed | cancelled | expired    before any worker took it, or governance refused it then

Every change and its audit event are one transaction. An attempt is fenced: it may only finish the request while
the row still carries its epoch and attempt, so a worker that was given up for lost cannot overwrite the attempt
that replaced it. Cancelling a queued request ends it at once; a running one is marked, and ended by its worker, which
knows what was said so far. What governance refuses after it was queued is `failed` here, with the code `policy_veto` or
`key_revoked`; its event is `vetoed` where a policy or a project is the reason. Functions here take a connection inside
a transaction and may be run again if it fails.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.audit.events import Subject, ciphertext_hash, event, record
from tasks.db import now
from tasks.errors import AttemptsExhausted, Cancelled, Expired
from tasks.idempotency import Idempotency, remember
from tasks.ids import made_at
from tasks.job import Result
from tasks.schema import TERMINAL_STATES, audit_events, requests

FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that governance allows, with everything that is stored of it.

    `decision` holds the audit columns that governance and assembly filled in; `data_key` is wrapped, `payload` sealed.
    `columns` are those of the requests table that the caller chose: api, priority, deadline.
    """

    subject: Subject
    decision: Mapping[str, Any]
    static_profile_hash: str
    data_key: bytes
    payload: bytes
    columns: Mapping[str, Any]
    idempotency: Idempotency | None = None


def admit(connection: Connection, admission: Admission) -> str:
    """Record the request as received and admitted, and store it as queued; return its id.

    If its idempotency key was used within the last day, nothing is stored, and the earlier request's id is returned.
    Raises IdempotencyConflict if that had another body.
    """
    at = now()
    subject = admission.subject
    if admission.idempotency is not None:
        earlier = remember(connection, subject, admission.idempotency, at)
        if earlier is not None:
            return earlier
    connection.execute(
        sa.insert(requests),
        {
            "request_id": subject.request_id,
            "organization": subject.organization,
            "api_key_id": subject.api_key_id,
            "agent_name": subject.agent_name,
            "static_profile_hash": admission.static_profile_hash,
            "state": "queued",
            "epoch": FIRST_EPOCH,
            "attempt": 0,
            "created_at": at,
            "published_at": at,
            "data_key": admission.data_key,
            "payload": admission.payload,
            "project_id": admission.decision.get("project_id"),
            **admission.columns,
        },
    )
    record(
        connection,
        event(subject, "received", at=made_at(subject.request_id)),
        event(
            subject,
            "admitted",
            at=at,
            epoch=FIRST_EPOCH,
            static_profile_hash=admission.static_profile_hash,
            payload_sha256=ciphertext_hash(admission.payload),
            **admission.decision,
        ),
    )
    return subject.request_id


def refuse(
    connection: Connection,
    subject: Subject,
    kind: Literal["vetoed", "failed"],
    code: str,
    facts: Mapping[str, Any],
) -> None:
    """Record a request that is answered with an error and never queued."""
    received = event(subject, "received", at=made_at(subject.request_id))
    record(connection, received, event(subject, kind, code=code, **facts))


@dataclass(frozen=True, slots=True)
class Attempt:
    """One worker's right to run a request, until the row carries another epoch or attempt."""

    subject: Subject
    epoch: int
    number: int
    worker: str | None = None
    deadline: datetime | None = None


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
) -> Attempt | NotStarted:
    """Begin the next attempt. A request that was cancelled, is too late or used all its attempts is ended instead.

    So is one with a `refusal`, if nothing else ends it.
    """
    at = now()
    row = None if refusal else _begin(connection, request_id, epoch, worker, max_attempts, at)
    if row is not None:
        attempt = Attempt(_subject(row), epoch, row.attempt, worker, row.deadline)
        record(connection, event(attempt.subject, "started", attempt=attempt.number, epoch=epoch, worker=worker))
        return attempt
    row = _progress(connection, request_id)
    if row is not None and row.state not in TERMINAL_STATES and row.epoch == epoch:
        last = Attempt(_subject(row), epoch, row.attempt, row.worker)
        if row.cancel_requested_at is not None:
            finish(connection, last, "cancelled", code=Cancelled.code)
        elif row.deadline is not None and row.deadline <= at:
            finish(connection, last, "expired", code=Expired.code)
        elif refusal is None or row.attempt >= max_attempts:
            finish(connection, last, "failed", code=AttemptsExhausted.code)
        else:
            finish(connection, last, "failed", kind=refusal.kind, code=refusal.code, **refusal.facts)
        # Read again: the last attempt may have been slow, not lost, and have finished just now.
        row = _progress(connection, request_id)
    return NotStarted(None) if row is None else NotStarted(row.state, row.attempt, row.error_code, row.answered)


def _begin(
    connection: Connection, request_id: str, epoch: int, worker: str, max_attempts: int, at: datetime
) -> Row[Any] | None:
    """Return the row of a request that may begin another attempt, and has."""
    return connection.execute(
        sa.update(requests)
        .where(
            requests.c.request_id == request_id,
            requests.c.epoch == epoch,
            requests.c.state.in_(("queued", "running")),
            requests.c.attempt < max_attempts,
            requests.c.cancel_requested_at.is_(None),
            sa.or_(requests.c.deadline.is_(None), requests.c.deadline > at),
        )
        .values(state="running", attempt=requests.c.attempt + 1, worker=worker)
        .returning(*_SUBJECT, requests.c.attempt, requests.c.deadline)
    ).one_or_none()


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


def cancel(connection: Connection, request_id: str, organization: str) -> Row[Any] | None:
    """Cancel the request: a queued one ends here, a running one is marked for its worker.

    Returns its row as it was before, or None if this organization has no such request.
    """
    row = find(connection, request_id, organization)
    if row is None or row.state in TERMINAL_STATES:
        return row
    queued = row.state == "queued" and finish(
        connection, Attempt(_subject(row), row.epoch, row.attempt), "cancelled", code=Cancelled.code
    )
    if not queued:
        connection.execute(
            sa.update(requests)
            .where(
                requests.c.request_id == request_id,
                requests.c.cancel_requested_at.is_(None),
                requests.c.state.not_in(TERMINAL_STATES),
            )
            .values(cancel_requested_at=now())
        )
    return row


def expire(connection: Connection, request_id: str) -> None:
    """End a request that no worker took before its deadline."""
    row = _progress(connection, request_id)
    if row is not None and row.state == "queued" and row.deadline is not None and row.deadline <= now():
        finish(connection, Attempt(_subject(row), row.epoch, row.attempt), "expired", code=Expired.code)


def deadline(connection: Connection, request_id: str) -> datetime | None:
    """Return until when the request must be answered, if it must be by some time."""
    query = sa.select(requests.c.deadline).where(requests.c.request_id == request_id)
    return connection.execute(query).scalar_one_or_none()


def to_stop(connection: Connection, request_ids: Collection[str]) -> list[str]:
    """Return which of these running requests somebody cancelled."""
    query = sa.select(requests.c.request_id).where(
        requests.c.request_id.in_(request_ids), requests.c.cancel_requested_at.is_not(None)
    )
    return list(connection.execute(query).scalars())


def finish(
    connection: Connection,
    attempt: Attempt,
    state: Literal["completed", "failed", "cancelled", "expired"],
    *,
    kind: Literal["vetoed", "completed", "failed", "cancelled", "expired"] | None = None,
    code: str | None = None,
    result: bytes | None = None,
    **facts: Any,
) -> bool:
    """End the request with its terminal event, of `kind` if that is not `state`. Returns False if it was fenced off.

    Saying the same again, after a commit whose answer was lost, returns True and changes nothing.
    """
    mine = (
        requests.c.request_id == attempt.subject.request_id,
        requests.c.epoch == attempt.epoch,
        requests.c.attempt == attempt.number,
    )
    at = now()
    changed = connection.execute(
        sa.update(requests)
        .where(*mine, requests.c.state.not_in(TERMINAL_STATES))
        .values(state=state, finished_at=at, error_code=code, result=result)
    )
    if changed.rowcount == 0:
        ended = connection.execute(sa.select(requests.c.state, requests.c.error_code).where(*mine)).one_or_none()
        return ended is not None and tuple(ended) == (state, code)
    facts |= {"code": code, "worker": attempt.worker}
    last = event(attempt.subject, kind or state, attempt=attempt.number, epoch=attempt.epoch, at=at, **facts)
    record(connection, last)
    return True


def veto_of(connection: Connection, request_id: str) -> Mapping[str, Any] | None:
    """Return the veto object that a request ended with, if it did."""
    query = sa.select(audit_events.c.details).where(
        audit_events.c.request_id == request_id, audit_events.c.kind == "vetoed"
    )
    held = connection.execute(query).scalar()
    return held.get("veto") if held else None


def find(connection: Connection, request_id: str, organization: str) -> Row[Any] | None:
    """Return the request's row, or None if this organization has no such request."""
    return connection.execute(
        sa.select(requests).where(requests.c.request_id == request_id, requests.c.organization == organization)
    ).one_or_none()


def page(
    connection: Connection, organization: str, filters: Mapping[str, Any], after: str | None, limit: int
) -> list[Row[Any]]:
    """Return up to `limit` requests of the organization, the newest first, older than `after` if that is given."""
    query = sa.select(requests).where(requests.c.organization == organization)
    query = query.where(*(requests.c[name] == value for name, value in filters.items()))
    if after is not None:
        query = query.where(requests.c.request_id < after)
    return list(connection.execute(query.order_by(requests.c.request_id.desc()).limit(limit)))


_SUBJECT = (requests.c.request_id, requests.c.organization, requests.c.api_key_id, requests.c.agent_name)


def _progress(connection: Connection, request_id: str) -> Any:
    names = ("state", "epoch", "attempt", "error_code", "worker", "cancel_requested_at", "deadline")
    answered = requests.c.result.is_not(None).label("answered")
    query = sa.select(*_SUBJECT, *(requests.c[name] for name in names), answered)
    return connection.execute(query.where(requests.c.request_id == request_id)).one_or_none()


def _subject(row: Row[Any]) -> Subject:
    return Subject(row.request_id, row.organization, row.api_key_id, row.agent_name)
