"""The database as a worker uses it: from its loop, and however long the database is away.

What was done must be recorded, and a request that waits for the database loses nothing by it, so everything here is tried
again until it goes through. Whoever cannot wait so long is interrupted where it waits (`worker_gpu.scopes`).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.db import Database, now
from tasks.errors import DatabaseUnavailable
from tasks.requests_read import lost_attempt
from tasks.schema import requests
from tasks.tracing import span

T = TypeVar("T")
RETRY_S = 1.0


class Records:
    """Reads and writes, waiting for the database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returned, once it is committed."""
        return await self.when_there(lambda: self.try_write(work))

    async def try_write(self, work: Callable[[Connection], T]) -> T:
        """Return the same, tried once. Raises DatabaseUnavailable."""
        with span("commit"):
            return await asyncio.wrap_future(self._database.submit(work))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Return what `work`, which blocks, returns."""
        return await self.when_there(lambda: asyncio.to_thread(work))

    async def time_left_s(self, request_id: str) -> float:
        """Return for how many seconds somebody will wait for the request: 0 if nobody does any more."""
        return await self.in_thread(lambda: self._database.read(lambda on: _time_left_s(on, request_id)))

    async def attempts_left(self, request_id: str, max_attempts: int) -> int:
        """Return how many more attempts the request has, of `max_attempts`; 0 if there is no such request."""
        query = sa.select(max_attempts - requests.c.attempt + requests.c.excused)
        query = query.where(requests.c.request_id == request_id)
        left = await self.in_thread(lambda: self._database.read(lambda on: on.execute(query).scalar_one_or_none()))
        return 0 if left is None else int(left)

    def lost_attempt(self, request_id: str, number: int) -> Row[Any] | None:
        """Return the event with which an attempt began that nobody gave back, if there is one. Blocks."""
        return self._database.read(lambda on: lost_attempt(on, request_id, number))

    async def result(self, request_id: str) -> bytes | None:
        """Return what is stored of the request's answer, sealed."""
        query = sa.select(requests.c.result).where(requests.c.request_id == request_id)
        return await self.in_thread(lambda: self._database.read(lambda on: on.execute(query).scalar_one_or_none()))

    async def when_there(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return what `work` gives, once it does not raise DatabaseUnavailable."""
        while True:
            try:
                return await work()
            except DatabaseUnavailable:
                await asyncio.sleep(RETRY_S)


def _time_left_s(connection: Connection, request_id: str) -> float:
    query = sa.select(requests.c.deadline).where(
        requests.c.request_id == request_id,
        requests.c.finished_at.is_(None),
        requests.c.cancel_requested_at.is_(None),
    )
    row = connection.execute(query).one_or_none()
    left_s = 0.0 if row is None else seconds_until(row.deadline)
    return math.inf if left_s is None else left_s


def seconds_until(deadline: datetime | None) -> float | None:
    """Return how long it is until then, 0 if it is past, None if there is no deadline."""
    return None if deadline is None else max(0.0, (deadline - now()).total_seconds())
