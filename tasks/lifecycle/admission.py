"""The first steps of a request's life: it is received, and then admitted and queued, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy.engine import Connection, Row

from tasks.audit.events import Subject, ciphertext_hash, event, record
from tasks.db import now
from tasks.db_statements import insertion
from tasks.idempotency import Idempotency, remember
from tasks.ids import made_at
from tasks.requests_read import existing
from tasks.schema import requests

FIRST_EPOCH = 1
_INSERT = insertion(requests, returning=True)


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that governance allows, with everything that is stored of it.

    `decision` holds the audit columns that governance and assembly filled in; `data_key` is wrapped, `payload` sealed.
    `columns` are those of the requests table that the caller chose: api, priority, deadline. `message` is the sealed
    part of the queue message and `prompt_tokens` its length: without them a message that Redis loses is lost for good,
    and the request is then dead.
    """

    subject: Subject
    decision: Mapping[str, Any]
    static_profile_hash: str
    data_key: bytes
    payload: bytes
    columns: Mapping[str, Any]
    idempotency: Idempotency | None = None
    message: bytes | None = None
    prompt_tokens: int | None = None


def admit(connection: Connection, admission: Admission) -> Row[Any]:
    """Record the request as received and admitted, and store it as queued; return its row.

    If its idempotency key was used within the last day, nothing is stored, and the earlier request's row is returned.
    Raises IdempotencyConflict if that had another body.
    """
    at = now()
    subject = admission.subject
    if admission.idempotency is not None:
        earlier = remember(connection, subject, admission.idempotency, at)
        if earlier is not None:
            return existing(connection, earlier, subject.organization)
    row = _INSERT.one(
        connection,
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
            "message": admission.message,
            "prompt_tokens": admission.prompt_tokens,
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
    return row


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
