"""What every process can be asked: which release it is, and what its pools of connections do."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import redis
from prometheus_client.core import Metric

from tasks.db import Database
from tasks.metrics import shared
from tasks.metrics.making import Process


class Own:
    """The readings of one process. `client` is the one to Redis that its threads share, if there is one."""

    def __init__(self, process: Process, database: Database, client: redis.Redis | None = None) -> None:
        self._build = (process, _version(), platform.python_version())
        self._database, self._client = database, client

    def describe(self) -> Iterable[Metric]:
        """Have nothing looked up before somebody asks."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Look everything up: nothing of it waits for anybody."""
        yield shared.BUILD.by({self._build: 1})
        load = self._database.load
        yield shared.DATABASE_POOL.by({("in_use",): load.in_use, ("idle",): load.idle})
        yield shared.DATABASE_POOL_SIZE.now(load.size)
        yield shared.UNCOMMITTED.now(load.uncommitted_s)
        yield shared.UNCOMMITTED_WRITES.now(load.uncommitted)
        if self._client is not None:
            pool: Any = self._client.connection_pool
            yield shared.REDIS_POOL_IN_USE.now(pool.max_connections - pool.pool.qsize())
            yield shared.REDIS_POOL_SIZE.now(pool.max_connections)


def _version() -> str:
    try:
        return importlib.metadata.version("metaqore-gateway")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
