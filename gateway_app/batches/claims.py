"""Who drives a batch: one process at a time, and another one when it is gone.

A claim is a number in the batch's row, raised each time somebody takes the batch, and an instant until which it holds.
Every write of a driver first renews its claim, in the same transaction, and is undone if the number is no longer its
own: a driver that was given up for dead, and is not, changes nothing any more. Correctness rests on the number alone;
clocks only decide when others may take over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.db import Database, now
from tasks.schema import api_keys
from tasks.schema_batches import OPEN_STATUSES, batches

T = TypeVar("T")


class ClaimLost(Exception):
    """Another driver has the batch, or it needs none any more."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to drive one batch, fenced by `number`, kept for `claim_s` seconds after each write."""

    database: Database
    batch_id: str
    number: int
    claim_s: float

    def write(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returned, once it is committed. Raises ClaimLost; then nothing of it was."""

        def fenced(connection: Connection) -> T:
            values = {"claimed_until": now() + timedelta(seconds=self.claim_s)}
            if connection.execute(sa.update(batches).where(*self._mine).values(values)).rowcount != 1:
                raise ClaimLost
            return work(connection)

        return self.database.write(fenced)

    def look(self) -> Row[Any]:
        """Return the batch as it is now, with `revoked_at` of its key, renewing a claim that is growing old.

        Raises ClaimLost.
        """
        query = sa.select(batches, api_keys.c.revoked_at)
        query = query.join(api_keys, api_keys.c.key_id == batches.c.api_key_id, isouter=True).where(*self._mine)
        row = self.database.read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            raise ClaimLost
        if row.claimed_until < now() + timedelta(seconds=self.claim_s * 2 / 3):
            self.write(lambda _connection: None)
        return row

    def move(self, connection: Connection, before: str, after: str, values: Mapping[str, Any]) -> bool:
        """Change the batch's status. Returns False if it is not `before`: its owner has cancelled it meanwhile."""
        statement = sa.update(batches).where(*self._mine, batches.c.status == before)
        return connection.execute(statement.values({**values, "status": after})).rowcount == 1

    def fail(self, errors: list[dict[str, Any]]) -> None:
        """End the batch as failed. Raises ClaimLost."""
        statement = sa.update(batches).where(*self._mine)
        values = {"status": "failed", "ended_at": now(), "errors": errors}
        self.write(lambda connection: connection.execute(statement.values(values)) and None)

    def release(self) -> None:
        """Let others take the batch at once."""
        statement = sa.update(batches).where(*self._mine).values(claimed_until=now())
        self.database.write(lambda connection: connection.execute(statement) and None)

    @property
    def _mine(self) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            batches.c.batch_id == self.batch_id,
            batches.c.claim == self.number,
            batches.c.status.in_(OPEN_STATUSES),
        )


def take(database: Database, owner: str, claim_s: float) -> Claim | None:
    """Claim a batch that nobody drives, if there is one.

    The organization with the fewest batches under way goes first, then the oldest batch: nobody's thousand batches keep
    another's first one waiting.
    """
    at = now()
    free = sa.and_(
        batches.c.status.in_(OPEN_STATUSES), sa.or_(batches.c.claimed_until.is_(None), batches.c.claimed_until <= at)
    )
    # Asked first: on SQLite every write transaction keeps all other writers out.
    if not database.read(
        lambda connection: connection.execute(sa.select(batches.c.batch_id).where(free).limit(1)).first()
    ):
        return None
    driven = batches.alias()
    under_way = sa.select(sa.func.count()).where(
        driven.c.organization == batches.c.organization, driven.c.status.in_(OPEN_STATUSES), driven.c.claimed_until > at
    )
    query = sa.select(batches.c.batch_id).where(free)
    query = query.order_by(under_way.scalar_subquery(), batches.c.batch_id).limit(1).with_for_update(skip_locked=True)
    until = at + timedelta(seconds=claim_s)

    def work(connection: Connection) -> Claim | None:
        batch_id = connection.execute(query).scalar()
        if batch_id is None:
            return None
        statement = sa.update(batches).where(batches.c.batch_id == batch_id)
        values = {"claim": batches.c.claim + 1, "claimed_by": owner, "claimed_until": until}
        number = connection.execute(statement.values(values).returning(batches.c.claim)).scalar_one()
        return Claim(database, batch_id, number, claim_s)

    return database.write(work)
