"""Idempotency keys: a client's way to ask again without asking for more.

An organization's key stands for the request it first came with, for a day. It is noted in the transaction that admits
the request, so one that was never admitted uses up no key. Keys and bodies are kept as keyed hashes. What became of the
request does not matter: the key of one that failed or is dead tells just that, so that nothing runs twice unasked.
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
    """Return the id of the request that used the key within a day before `at`; if there is none, note that this one does.

    Raises IdempotencyConflict if that had another body, and IntegrityError if another process notes the key in the same
    moment: asked again, this finds which request it was.
    """
    earlier = _use(connection, subject.organization, key, at)
    if earlier is None:
        # An older use may still be noted: keys are cleared away in their own time. One that another process has noted
        # since the look above must stay, so that the insertion finds it.
        old = idempotency_keys.c.created_at < at - KEPT
        connection.execute(sa.delete(idempotency_keys).where(*_is(subject.organization, key), old))
        row = {"organization": subject.organization, "key_hash": key.key_hash, "body_hash": key.body_hash}
        connection.execute(sa.insert(idempotency_keys), {**row, "request_id": subject.request_id, "created_at": at})
        return None
    if earlier.body_hash != key.body_hash:
        raise IdempotencyConflict
    return str(earlier.request_id)


def earlier_use(connection: Connection, organization: str, key: Idempotency) -> Row[Any] | None:
    """Return the row that says which request used the key within the last day, if any did."""
    return _use(connection, organization, key, now())


def _use(connection: Connection, organization: str, key: Idempotency, at: datetime) -> Row[Any] | None:
    return connection.execute(
        sa.select(idempotency_keys).where(*_is(organization, key), idempotency_keys.c.created_at >= at - KEPT)
    ).one_or_none()


def _is(organization: str, key: Idempotency) -> tuple[sa.ColumnElement[bool], ...]:
    return idempotency_keys.c.organization == organization, idempotency_keys.c.key_hash == key.key_hash


def repoint(connection: Connection, organization: str, earlier_id: str, later_id: str) -> None:
    """Let the key that a request came with, if any, stand for the one that was made to repeat it."""
    connection.execute(
        sa.update(idempotency_keys)
        .where(idempotency_keys.c.organization == organization, idempotency_keys.c.request_id == earlier_id)
        .values(request_id=later_id)
    )


def forget_old(connection: Connection, limit: int) -> int:
    """Clear away up to `limit` keys that are older than a day, the oldest first; return how many.

    No use counts them any more: this only keeps the table small.
    """
    name = sa.tuple_(idempotency_keys.c.organization, idempotency_keys.c.key_hash)
    old = (
        sa.select(idempotency_keys.c.organization, idempotency_keys.c.key_hash)
        .where(idempotency_keys.c.created_at < now() - KEPT)
        .order_by(idempotency_keys.c.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = [tuple(row) for row in connection.execute(old)]
    if not rows:
        return 0
    return connection.execute(sa.delete(idempotency_keys).where(name.in_(rows))).rowcount


def forget(connection: Connection, request_id: str, organization: str) -> None:
    """Let the idempotency key of a request that could not be queued be used again."""
    connection.execute(
        sa.delete(idempotency_keys).where(
            idempotency_keys.c.organization == organization, idempotency_keys.c.request_id == request_id
        )
    )
