"""Idempotency keys: a client's way to ask again without asking for more.

An organization's key stands for the request it first came with, for a day. It is noted in the transaction that admits
the request, so one that was never admitted uses up no key. Keys and bodies are kept as keyed hashes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.audit.events import Subject
from tasks.db import now
from tasks.errors import IdempotencyConflict
from tasks.schema import idempotency_keys

KEPT = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's word that a request is the same as an earlier one: keyed hashes of its key and of the body."""

    key_hash: bytes
    body_hash: bytes


def remember(connection: Connection, subject: Subject, key: Idempotency, at: datetime) -> str | None:
    """Return the id of the request that used the key before; if there is none, note that this one does."""
    connection.execute(sa.delete(idempotency_keys).where(idempotency_keys.c.created_at < at - KEPT))
    earlier = earlier_use(connection, subject.organization, key)
    if earlier is None:
        row = {"organization": subject.organization, "key_hash": key.key_hash, "body_hash": key.body_hash}
        connection.execute(sa.insert(idempotency_keys), {**row, "request_id": subject.request_id, "created_at": at})
        return None
    if earlier.body_hash != key.body_hash:
        raise IdempotencyConflict
    return str(earlier.request_id)


def earlier_use(connection: Connection, organization: str, key: Idempotency) -> Row[Any] | None:
    """Return the row that says which request used the key within the last day, if any did."""
    return connection.execute(
        sa.select(idempotency_keys).where(
            idempotency_keys.c.organization == organization,
            idempotency_keys.c.key_hash == key.key_hash,
            idempotency_keys.c.created_at >= now() - KEPT,
        )
    ).one_or_none()


def forget(connection: Connection, request_id: str, organization: str) -> None:
    """Let the idempotency key of a request that could not be queued be used again."""
    connection.execute(
        sa.delete(idempotency_keys).where(
            idempotency_keys.c.organization == organization, idempotency_keys.c.request_id == request_id
        )
    )
