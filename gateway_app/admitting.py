"""The one commit that takes a request in, also where its answer is lost.

A database that goes away while it commits may have committed or not. The caller must know: answered with 503, it sends
its request again, and the first would run too. So a refusal is recorded under the same id. If the commit was made,
the refusal collides with it; if it is still under way, the refusal waits for it; if it was not made, the refusal stands
in its place for good. Only a database that stays away for its whole time-out leaves the question open, and the caller
is told that it is.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks import lifecycle, requests_read
from tasks.db import Database
from tasks.db_errors import CommitUndecided
from tasks.errors import DatabaseUnavailable
from tasks.idempotency import repoint
from tasks.schema import requests

_POLL_S = 0.1


def commit(database: Database, admission: lifecycle.Admission, retry_of: str | None = None) -> Row[Any]:
    """Commit the request with its events; return the row of the request that holds now.

    That is another's where the idempotency key was used before. A request that is a retry takes over the key of the
    request `retry_of`. Raises DatabaseUnavailable if the request was not taken, and CommitUndecided, which is one, if
    nobody can say; IdempotencyConflict.
    """
    subject = admission.subject

    def work(connection: Connection) -> Row[Any]:
        row = lifecycle.admit(connection, admission)
        if retry_of is not None and row.request_id == subject.request_id:
            repoint(connection, subject.organization, retry_of, row.request_id)
        return row

    try:
        try:
            return database.write(work)
        except sa.exc.IntegrityError:
            # The same idempotency key was committed in the same moment; now it can be seen.
            if admission.idempotency is None:
                raise
            return database.write(work)
    except CommitUndecided:
        if not _was_made(database, admission):
            raise DatabaseUnavailable from None
        return database.read(
            lambda connection: requests_read.existing(connection, subject.request_id, subject.organization)
        )


def _was_made(database: Database, admission: lifecycle.Admission) -> bool:
    """Tell whether the commit was made whose answer was lost. Raises CommitUndecided if the database stays away."""
    subject = admission.subject

    def refuse(connection: Connection) -> None:
        lifecycle.refuse(connection, subject, "failed", DatabaseUnavailable.code, admission.decision)

    def stored(connection: Connection) -> bool:
        query = sa.select(requests.c.state).where(requests.c.request_id == subject.request_id)
        return connection.execute(query).scalar() is not None

    until = time.monotonic() + database.timeout_s
    while True:
        collided = False
        with suppress(DatabaseUnavailable):
            try:
                database.write(refuse)
            except sa.exc.IntegrityError:
                collided = True
            else:
                return False
        with suppress(DatabaseUnavailable):
            if database.read(stored):
                return True
            if collided:
                # With an earlier refusal of ours, whose answer was lost in turn.
                return False
        if time.monotonic() >= until:
            raise CommitUndecided
        time.sleep(_POLL_S)
