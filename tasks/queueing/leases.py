"""Leases: a worker's hold on the messages it is running.

A lease is an entry in the sorted set `leases`, scored with the time it was last renewed. A worker renews all of its leases on
a connection of its own, every third of a lease, so that a long request is not taken for lost; when it dies, they age,
and the next sweep of any worker gives the messages back.
"""

from __future__ import annotations

from collections.abc import Iterable

from redis.asyncio import Redis

from tasks.queueing.keys import QueueKeys


class Leases:
    """Renews and drops the leases of one worker."""

    def __init__(self, client: Redis, keys: QueueKeys) -> None:
        self._client = client
        self._keys = keys

    async def renew(self, tags: Iterable[str]) -> None:
        """Renew each lease that still exists. Raises redis.RedisError."""
        seconds, microseconds = await self._client.time()
        scores = dict.fromkeys(tags, seconds + microseconds / 1_000_000)
        if scores:
            await self._client.zadd(self._keys.leases, scores, xx=True)

    async def drop(self, tag: str) -> None:
        """End a lease and forget its message: the request has ended. Raises redis.RedisError."""
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.hdel(self._keys.leased, tag)
            pipe.zrem(self._keys.leases, tag)
            await pipe.execute()
