"""Audit events: rows that are only ever added.

An event is named by (request id, kind, attempt, epoch), so that recording the same thing twice fails instead of counting
twice. Of terminal kinds there is one for each request, whatever its name. Events hold identifiers, decisions, counts and
hashes of ciphertext; never a word of a prompt or an answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from tasks.db import ADDED, now
from tasks.db_statements import insertion
from tasks.schema import audit_events

_INSERT = insertion(audit_events)


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom an event is about: the request and the caller it belongs to."""

    request_id: str
    organization: str
    api_key_id: str
    agent_name: str | None = None


def event(
    subject: Subject, kind: str, *, attempt: int = 0, epoch: int = 0, at: datetime | None = None, **facts: Any
) -> dict[str, Any]:
    """Return an event's row. `facts` are further columns of `audit_events`."""
    return {
        "request_id": subject.request_id,
        "kind": kind,
        "attempt": attempt,
        "epoch": epoch,
        "occurred_at": at or now(),
        "organization": subject.organization,
        "api_key_id": subject.api_key_id,
        "agent_name": subject.agent_name,
        **facts,
    }


def record(connection: Connection, *events: Mapping[str, Any]) -> None:
    """Add `events` in the caller's transaction. Raises IntegrityError if one is already recorded."""
    _INSERT.run_each(connection, events)
    if (added := connection.info.get(ADDED)) is not None:
        added.extend((row["kind"], row.get("code")) for row in events)


def ciphertext_hash(sealed: bytes) -> str:
    """Return the SHA-256 of a sealed payload: what an event commits to in its place."""
    return hashlib.sha256(sealed).hexdigest()
