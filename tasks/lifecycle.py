"""A request's states, and the only code that changes them.

    received ──▶ vetoed | failed                     refused: recorded, never queued
        └──▶ queued ──▶ running ──▶ completed | failed | cancelled | expired
                          ▲  │
                          └──┘ another attempt, after its worker was lost

Every change and its audit event are one transaction. An attempt is fenced: it may only finish the request while
the row still carries its epoch and attempt, so a worker that was given up for lost cannot overwrite the attempt
that replaced it. Functions here take a connection inside a transaction and may be run again if it fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.audit.events import Subject, ciphertext_hash, event, record
from tasks.db import now
from tasks.errors import AttemptsExhausted
from tasks.ids import made_at
from tasks.job import Result
from tasks.schema import TERMINAL_STATES, requests

FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that governance allows, with everything that is stored of it.

    `decision` holds the audit columns that governance and assembly filled in; `data_key` is wrapped, `payload` sealed.
    """

    subject: Subject
    decision: Mapping[str, Any]
    static_profile_hash: str
    data_key: bytes
    payload: bytes


def admit(connection: Connection, admission: Admission) -> None:
    """Record the request as received and admitted, and store it as queued."""
    at = now()
    subject = admission.subject
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


@dataclass(frozen=True, slots=True)
class NotStarted:
    """Why a message leads to no attempt. `state` is the request's, or None if there is no such request.

    `attempt` and `code` are those of the last attempt, for telling watchers again how the request ended.
    """

    state: str | None
    attempt: int = 0
    code: str | None = None


def start(connection: Connection, request_id: str, epoch: int, worker: str, max_attempts: int) -> Attempt | NotStarted:
    """Begin the next attempt. A request that used all its attempts is failed instead."""
    row = connection.execute(
        sa.update(requests)
        .where(
            requests.c.request_id == request_id,
            requests.c.epoch == epoch,
            requests.c.state.in_(("queued", "running")),
            requests.c.attempt < max_attempts,
        )
        .values(state="running", attempt=requests.c.attempt + 1, worker=worker)
        .returning(*_SUBJECT, requests.c.attempt)
    ).one_or_none()
    if row is not None:
        attempt = Attempt(_subject(row), epoch, row.attempt, worker)
        record(connection, event(attempt.subject, "started", attempt=attempt.number, epoch=epoch, worker=worker))
        return attempt
    row = _progress(connection, request_id)
    if row is not None and row.state not in TERMINAL_STATES and row.epoch == epoch:
        last = Attempt(_subject(row), epoch, row.attempt, row.worker)
        finish(connection, last, "failed", code=AttemptsExhausted.code)
        # Read again: the last attempt may have been slow, not lost, and have finished just now.
        row = _progress(connection, request_id)
    return NotStarted(None) if row is None else NotStarted(row.state, row.attempt, row.error_code)


def complete(connection: Connection, attempt: Attempt, result: Result, sealed: bytes) -> bool:
    """Record the answer and store it sealed. Returns False if the attempt was fenced off; then nothing changed."""
    return finish(
        connection,
        attempt,
        "completed",
        result=sealed,
        payload_sha256=ciphertext_hash(sealed),
        model=result.model,
        **result.usage.model_dump(),
        **result.timings.model_dump(),
        details={"finish_reason": result.finish_reason},
    )


def finish(
    connection: Connection,
    attempt: Attempt,
    state: Literal["completed", "failed", "cancelled", "expired"],
    *,
    code: str | None = None,
    result: bytes | None = None,
    **facts: Any,
) -> bool:
    """End the request with its terminal event. Returns False if the attempt was fenced off.

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
    record(connection, event(attempt.subject, state, attempt=attempt.number, epoch=attempt.epoch, at=at, **facts))
    return True


def find(connection: Connection, request_id: str, organization: str) -> Row[Any] | None:
    """Return the request's row, or None if this organization has no such request."""
    return connection.execute(
        sa.select(requests).where(requests.c.request_id == request_id, requests.c.organization == organization)
    ).one_or_none()


_SUBJECT = (requests.c.request_id, requests.c.organization, requests.c.api_key_id, requests.c.agent_name)


def _progress(connection: Connection, request_id: str) -> Any:
    columns = (requests.c.state, requests.c.epoch, requests.c.attempt, requests.c.error_code, requests.c.worker)
    return connection.execute(sa.select(*_SUBJECT, *columns).where(requests.c.request_id == request_id)).one_or_none()


def _subject(row: Row[Any]) -> Subject:
    return Subject(row.request_id, row.organization, row.api_key_id, row.agent_name)
