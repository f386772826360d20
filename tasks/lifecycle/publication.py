"""The housekeeper's steps: what Redis lost is published again under a new epoch, and what is too late is ended.

The epoch is part of the message. So whatever turns up of an older one, a message or a worker that still runs it, is
fenced off from the moment on in which the row carries the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.audit.events import event, record
from tasks.db import now
from tasks.errors import Expired, QueueLost
from tasks.job import Chain
from tasks.lifecycle.ending import end, end_if_unwanted
from tasks.lifecycle.giving_back import queue_again
from tasks.lifecycle.rows import SUBJECT, last_attempt, locked
from tasks.prompts.chain import stored_chain
from tasks.schema import TERMINAL_STATES, profiles, requests

_MESSAGE = ("static_profile_hash", "prompt_tokens", "priority", "data_key", "message", "trace_context")
_STATIC_PART = sa.select(profiles.c.static_token_count, profiles.c.chain).where(
    profiles.c.static_profile_hash == sa.bindparam("static_profile_hash")
)


@dataclass(frozen=True, slots=True)
class Republished:
    """A request that is queued anew, and what its message is made of: the sealed part, and the wrapped key to it.

    `static_tokens` and `chain` are its profile's, as `tasks.job.Prompt` has them.
    """

    request_id: str
    epoch: int
    organization: str
    static_profile_hash: str
    prompt_tokens: int
    priority: str
    data_key: bytes
    message: bytes
    published_at: datetime
    trace_context: str | None = None
    static_tokens: int = 0
    chain: Chain = ()


def republish(
    connection: Connection, request_id: str, epoch: int, attempt: int, *, max_epochs: int
) -> Republished | None:
    """Queue a request whose message Redis lost under the next epoch, if it still is at `epoch` and `attempt`.

    Returns None if it is not, or has ended. It ends here if it was cancelled or is too late, and is `dead` after
    `max_epochs`, or where no message is kept (as of a release before this was). An attempt that ran is excused.
    """
    row = locked(connection, request_id, *(requests.c[name] for name in _MESSAGE))
    if row is None or row.state in TERMINAL_STATES or (row.epoch, row.attempt) != (epoch, attempt):
        return None
    if end_if_unwanted(connection, row) is not None:
        return None
    last = last_attempt(row)
    if row.epoch >= max_epochs or None in (row.message, row.data_key, row.prompt_tokens):
        end(connection, last, "dead", code=QueueLost.code)
        return None
    at = now()
    queue_again(connection, last, excused=row.state == "running", not_before=None, epoch=row.epoch + 1, published_at=at)
    again = event(last.subject, "requeued", at=at, attempt=row.attempt, epoch=row.epoch + 1, code=QueueLost.code)
    record(connection, again)
    columns = {name: getattr(row, name) for name in _MESSAGE}
    part = connection.execute(_STATIC_PART, {"static_profile_hash": row.static_profile_hash}).one_or_none()
    if part is not None:
        columns |= {"static_tokens": part.static_token_count, "chain": stored_chain(part.chain)}
    return Republished(request_id, row.epoch + 1, row.organization, published_at=at, **columns)


def expire_overdue(connection: Connection, limit: int) -> list[str]:
    """End up to `limit` requests that no worker took before their deadline, the latest first; return their ids.

    Rows that somebody is about to change are left to them.
    """
    columns: list[Any] = [*SUBJECT, *(requests.c[name] for name in ("epoch", "attempt", "worker", "deadline"))]
    overdue = connection.execute(
        sa.select(*columns)
        .where(
            requests.c.finished_at.is_(None),
            requests.c.deadline.is_not(None),
            requests.c.deadline <= now(),
            requests.c.state == "queued",
        )
        .order_by(requests.c.deadline)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for row in overdue:
        end(connection, last_attempt(row), "expired", code=Expired.code)
    return [row.request_id for row in overdue]
