"""Every way to a terminal state. Whichever comes first stands: none changes a request that has ended.

Cancelling a queued request ends it at once; a running one is marked, and ended by its worker, which knows what was said
so far. What governance refuses after it was queued is `failed` here, with the code `policy_veto` or `key_revoked`; its
event is `vetoed` where a policy or a project is the reason. The message kept for publishing again goes with the end.
"""

from __future__ import annotations

from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.audit.events import event, record
from tasks.db import now
from tasks.db_statements import Statement
from tasks.errors import Cancelled, Expired
from tasks.lifecycle.rows import Attempt, is_late, last_attempt, locked
from tasks.schema import TERMINAL_STATES, requests

End = Literal["completed", "failed", "cancelled", "expired", "dead"]
#: The states a request may be in when it is ended by somebody who holds its row.
OPEN = ("queued", "running")
_MINE = (
    requests.c.request_id == sa.bindparam("id"),
    requests.c.epoch == sa.bindparam("of_epoch"),
    requests.c.attempt == sa.bindparam("of_attempt"),
)
_END = Statement(
    sa.update(requests).where(
        *_MINE, sa.or_(requests.c.state == sa.bindparam("of_state"), requests.c.state == sa.bindparam("or_state"))
    ),
    ("state", "finished_at", "error_code", "result", "message", "not_before"),
)
_ENDED = sa.select(requests.c.state, requests.c.error_code).where(*_MINE)


def finish(connection: Connection, attempt: Attempt, state: End, *, code: str | None = None, **facts: Any) -> bool:
    """End the request as the attempt that runs it. Returns False if it was fenced off; then nothing changed.

    `facts` are further columns of the event, `result` the sealed answer. Saying the same again, after a commit whose
    answer was lost, returns True and changes nothing.
    """
    return end(connection, attempt, state, of=("running",), code=code, **facts)


def end(
    connection: Connection,
    attempt: Attempt,
    state: End,
    *,
    of: tuple[str, ...] = OPEN,
    kind: Literal["vetoed", "failed"] | None = None,
    code: str | None = None,
    result: bytes | None = None,
    **facts: Any,
) -> bool:
    """End the request with its terminal event, of `kind` if that is not `state`, as `finish` does.

    `of` are the states it may be in. Callers that hold the row's lock know which one that is.
    """
    mine = {"id": attempt.subject.request_id, "of_epoch": attempt.epoch, "of_attempt": attempt.number}
    at = now()
    # The message for publishing again, and the pause before another attempt, are of no more use.
    new = {"state": state, "finished_at": at, "error_code": code, "result": result}
    if _END.run(connection, {**mine, "of_state": of[0], "or_state": of[-1], **new}) == 0:
        ended = connection.execute(_ENDED, mine).one_or_none()
        return ended is not None and tuple(ended) == (state, code)
    facts |= {"code": code, "worker": attempt.worker}
    last = event(attempt.subject, kind or state, attempt=attempt.number, epoch=attempt.epoch, at=at, **facts)
    record(connection, last)
    return True


def end_if_unwanted(connection: Connection, row: Row[Any]) -> Literal["cancelled", "expired"] | None:
    """End the request of a locked row that somebody cancelled, or whose deadline has passed; return as what."""
    if row.cancel_requested_at is not None:
        end(connection, last_attempt(row), "cancelled", code=Cancelled.code)
        return "cancelled"
    if is_late(row, now()):
        end(connection, last_attempt(row), "expired", code=Expired.code)
        return "expired"
    return None


def cancel(connection: Connection, request_id: str, organization: str) -> Row[Any] | None:
    """Cancel the request: a queued one ends here, a running one is marked for its worker.

    Returns its row as it was before, or None if this organization has no such request.
    """
    row = connection.execute(
        sa.select(requests)
        .where(requests.c.request_id == request_id, requests.c.organization == organization)
        .with_for_update()
    ).one_or_none()
    if row is None or row.state in TERMINAL_STATES:
        return row
    if row.state == "queued":
        end(connection, last_attempt(row), "cancelled", code=Cancelled.code)
    elif row.cancel_requested_at is None:
        marked = sa.update(requests).where(requests.c.request_id == request_id).values(cancel_requested_at=now())
        connection.execute(marked)
    return row


def expire(connection: Connection, request_id: str) -> None:
    """End a request that no worker took before its deadline."""
    row = locked(connection, request_id)
    if row is not None and row.state == "queued" and is_late(row, now()):
        end(connection, last_attempt(row), "expired", code=Expired.code)
