"""Making clients of Redis: every one of them, but for those that kombu makes itself, comes from here."""

from __future__ import annotations

from typing import Any, cast

import redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.asyncio.sentinel import SentinelConnectionPool as AsyncSentinelPool
from redis.sentinel import Sentinel, SentinelConnectionPool

from tasks.queueing.address import Address, parse

CONNECT_TIMEOUT_S = 3.0
_HEALTH_CHECK_S = 10


class _SentinelPool(SentinelConnectionPool, redis.BlockingConnectionPool):
    """Connections to the master that Sentinel names, of which a thread waits for a free one."""


class _AsyncMaster(AsyncRedis):
    """A client of the master that Sentinel names, which closes its connections to the Sentinels with its own."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool = cast("AsyncSentinelPool", self.connection_pool)
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def connect(url: str, timeout_s: float, connections: int = 16) -> redis.Redis:
    """Return a client that never repeats a command by itself, whose socket timeout is `timeout_s`.

    It has at most so many `connections`, however many threads use it; a thread waits up to `timeout_s` for one.
    """
    address = parse(url)
    options = _options(address, timeout_s)
    options |= {"max_connections": connections, "timeout": timeout_s}
    options["retry"] = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
    if address.master_name is None:
        if address.tls is not None:
            options |= {"connection_class": redis.SSLConnection, **address.tls}
        (host, port) = address.hosts[0]
        return redis.Redis.from_pool(redis.BlockingConnectionPool(host=host, port=port, **options))  # type: ignore[no-untyped-call]
    asked_with = _sentinel_options(address, timeout_s)
    sentinel = Sentinel(list(address.hosts), sentinel_kwargs=asked_with)  # type: ignore[no-untyped-call]
    return redis.Redis.from_pool(_SentinelPool(address.master_name, sentinel, **options))  # type: ignore[no-untyped-call]


def connect_async(url: str, timeout_s: float) -> AsyncRedis:
    """Return a client for asyncio, whose socket timeout is `timeout_s`. It repeats a command whose answer was lost."""
    address = parse(url)
    options = _options(address, timeout_s)
    if address.master_name is None:
        if address.tls is not None:
            options |= {"ssl": True, **address.tls}
        (host, port) = address.hosts[0]
        return AsyncRedis(host=host, port=port, **options)
    asked_with = _sentinel_options(address, timeout_s)
    sentinel = AsyncSentinel(list(address.hosts), sentinel_kwargs=asked_with)  # type: ignore[no-untyped-call]
    client: AsyncRedis = sentinel.master_for(address.master_name, redis_class=_AsyncMaster, **options)
    return client


def _options(address: Address, timeout_s: float) -> dict[str, Any]:
    return {
        "db": address.db,
        "username": address.username,
        "password": address.password,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": min(timeout_s, CONNECT_TIMEOUT_S),
        "socket_keepalive": True,
        "health_check_interval": _HEALTH_CHECK_S,
    }


def _sentinel_options(address: Address, timeout_s: float) -> dict[str, Any]:
    short_s = min(timeout_s, CONNECT_TIMEOUT_S)
    return {"password": address.sentinel_password, "socket_timeout": short_s, "socket_connect_timeout": short_s}
