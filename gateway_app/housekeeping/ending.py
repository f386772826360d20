"""Ending what waited too long, and forgetting what is not needed any more; in small transactions, each bounded."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks import lifecycle
from tasks.db import Database
from tasks.idempotency import forget_old
from tasks.queueing.message import delivery_tag
from tasks.queueing.publisher import Publisher
from tasks.schema import requests

AT_ONCE = 200


class Endings:
    """Ends overdue requests and forgets idempotency keys."""

    def __init__(self, database: Database, publisher: Publisher) -> None:
        self._database, self._publisher = database, publisher

    def expire(self) -> int:
        """End the waiting requests whose deadline has passed, and make room in the queue; return how many those were.

        Raises DatabaseUnavailable or QueueUnavailable. A message that stays in Redis is dropped by whoever takes it.
        """
        count, ended = 0, AT_ONCE
        while ended == AT_ONCE:
            ids = self._database.write(lambda connection: lifecycle.expire_overdue(connection, AT_ONCE))
            for tag in self._database.read(lambda connection, ids=ids: _tags(connection, ids)) if ids else ():  # type: ignore[misc]
                self._publisher.withdraw(tag)
            ended = len(ids)
            count += ended
        return count

    def forget_keys(self) -> int:
        """Forget idempotency keys that are older than they are kept; return how many those were.

        Raises DatabaseUnavailable.
        """
        count, forgotten = 0, AT_ONCE
        while forgotten == AT_ONCE:
            forgotten = self._database.write(lambda connection: forget_old(connection, AT_ONCE))
            count += forgotten
        return count


def _tags(connection: Connection, ids: list[str]) -> list[str]:
    query = sa.select(requests.c.request_id, requests.c.epoch).where(requests.c.request_id.in_(ids))
    return [delivery_tag(request_id, epoch) for request_id, epoch in connection.execute(query)]
