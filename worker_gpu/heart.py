"""Saying that this worker lives, and in what state it is: every few seconds, and at once when the state changes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Literal

import redis
from redis.asyncio import Redis

from tasks.logs import get_logger
from tasks.queueing.heartbeats import INTERVAL_S, TTL_S
from tasks.queueing.keys import QueueKeys

logger = get_logger(__name__)
_STOP_S = 1.0
State = Literal["loading", "ready", "draining", "dead"]


class Heart:
    """Writes the heartbeat of `worker`, which serves `model`; `running` tells how many requests it runs.

    To be used on the loop, all of it.
    """

    def __init__(self, client: Redis, keys: QueueKeys, worker: str, model: str, running: Callable[[], int]) -> None:
        self.state: State = "loading"
        self._client = client
        self._keys = keys
        self._worker = worker
        self._model = model
        self._running = running
        self._changed = asyncio.Event()

    def become(self, state: State) -> None:
        """Say a new state, at once. The last ones are final: a worker that drains or is dead is not ready again."""
        if self.state in ("loading", "ready") or state == "dead":
            self.state = state
            self._changed.set()

    async def beat_for_ever(self) -> None:
        """Beat. Raises redis.RedisError when Redis does not take it; then call it again."""
        while True:
            self._changed.clear()
            await self._beat()
            try:
                await asyncio.wait_for(self._changed.wait(), INTERVAL_S)
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """Take the heartbeat back: the worker ends. Does not take long, whatever Redis does."""
        try:
            async with asyncio.timeout(_STOP_S):
                await self._client.delete(self._keys.heartbeat(self._worker))
        except (redis.RedisError, TimeoutError):
            logger.warning("the heartbeat could not be removed; it ends by itself")

    async def _beat(self) -> None:
        report = {"worker": self._worker, "state": self.state, "model": self._model, "running": str(self._running())}
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.set(self._keys.heartbeat(self._worker), json.dumps(report), ex=TTL_S)
            pipe.sadd(self._keys.workers, self._worker)
            await pipe.execute()
