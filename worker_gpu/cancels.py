"""Hearing that somebody cancelled a request that runs here, and cancelling one that an operator revokes.

The database decides. Gateways say on a channel what was cancelled, so that it stops at once; a word on the channel may be
lost, so the database is asked as well, now and then, about everything that runs.

Celery's revoke is not obeyed by Celery: it would end a request without a record, on the workers that heard of it, until
they restart. Here it cancels the request, as `DELETE` does, wherever it is.
"""

from __future__ import annotations

import asyncio
import functools

import sqlalchemy as sa
from redis.asyncio import Redis
from sqlalchemy.engine import Connection

from tasks import lifecycle, requests_read
from tasks.db import Database
from tasks.errors import DatabaseUnavailable
from tasks.queueing.heartbeats import INTERVAL_S
from tasks.queueing.keys import QueueKeys
from tasks.schema import requests
from worker_gpu.records import Records
from worker_gpu.scopes import Scopes


class Cancels:
    """Stops what was cancelled among `scopes`."""

    def __init__(self, database: Database, client: Redis, keys: QueueKeys, scopes: Scopes) -> None:
        self._database = database
        self._records = Records(database)
        self._client = client
        self._keys = keys
        self._scopes = scopes

    async def hear(self) -> None:
        """Stop what gateways say was cancelled, as long as the connection holds. Raises redis.RedisError at its end."""
        async with self._client.pubsub(ignore_subscribe_messages=True) as channel:
            await channel.subscribe(self._keys.cancels)
            while True:
                message = await channel.get_message(timeout=INTERVAL_S)
                if message is not None:
                    self._scopes.stop(message["data"].decode("ascii", "replace"), "cancelled")

    async def look(self) -> None:
        """Ask the database too, for ever."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            if running := list(self._scopes):
                for request_id in await asyncio.to_thread(self._cancelled, running):
                    self._scopes.stop(request_id, "cancelled")

    async def revoke(self, request_ids: list[str]) -> None:
        """Cancel requests, whosever they are, and have all workers hear of it. Ids of none are ignored."""
        for request_id in request_ids:
            if await self._records.write(functools.partial(_cancel, request_id=request_id)):
                self._scopes.stop(request_id, "cancelled")
                await self._client.publish(self._keys.cancels, request_id)

    def _cancelled(self, running: list[str]) -> list[str]:
        try:
            return self._database.read(lambda on: requests_read.to_stop(on, running))
        except DatabaseUnavailable:
            return []


def _cancel(connection: Connection, request_id: str) -> bool:
    """Cancel a request; tell whether there is such a one."""
    query = sa.select(requests.c.organization).where(requests.c.request_id == request_id)
    organization = connection.execute(query).scalar_one_or_none()
    return organization is not None and lifecycle.cancel(connection, request_id, organization) is not None
