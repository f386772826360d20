"""Reading the open requests from SQL, a page at a time in the order of their ids.

A partial index holds nothing but the open requests, so a page costs the same however many have ended, and a walk
through all of them holds no more than a page in memory. Requests of the last `GRACE_S` seconds are left out: their
gateway is just about to publish them.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.db import now
from tasks.ids import lower_bound
from tasks.queueing.message import delivery_tag
from tasks.schema import requests

#: Has PostgreSQL read a page in the index's order. Where its statistics are of a quieter time it takes the open requests for
#: few, and reads and sorts all that are left for each page.
_IN_ORDER = sa.text("SELECT set_config('enable_sort', 'off', true), set_config('enable_bitmapscan', 'off', true)")
PAGE = 500
GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """A request that has not ended, as it was when it was read."""

    request_id: str
    epoch: int
    attempt: int
    running: bool

    @property
    def tag(self) -> str:
        """Return what Redis knows its message by."""
        return delivery_tag(self.request_id, self.epoch)


def page(connection: Connection, after: str, limit: int) -> list[OpenRequest]:
    """Return the next open requests whose id is greater than `after`, up to `limit`."""
    if connection.dialect.name == "postgresql":
        connection.execute(_IN_ORDER)
    query = (
        sa.select(requests.c.request_id, requests.c.epoch, requests.c.attempt, requests.c.state)
        .where(
            requests.c.finished_at.is_(None),
            requests.c.request_id > after,
            requests.c.request_id < lower_bound(now() - timedelta(seconds=GRACE_S)),
        )
        .order_by(requests.c.request_id)
        .limit(limit)
    )
    return [
        OpenRequest(row.request_id, row.epoch, row.attempt, row.state == "running") for row in connection.execute(query)
    ]
