"""Tasks that run beside the requests for as long as the worker does."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import redis

from tasks.logs import get_logger

logger = get_logger(__name__)
_RETRY_S = 0.5
#: An outage that lasts is told no more often than this by each task.
_TOLD_EVERY_S = 10.0
_CANCEL_AGAIN_S = 0.5


async def through_outages(work: Callable[[], Awaitable[None]]) -> None:
    """Do `work`, and again whenever it ends, be it because Redis is away."""
    clock, told_at = asyncio.get_running_loop().time, -math.inf
    while True:
        try:
            await work()
        except redis.RedisError as error:
            if clock() - told_at >= _TOLD_EVERY_S:
                logger.warning("redis did not take it", error=type(error).__name__)
                told_at = clock()
        await asyncio.sleep(_RETRY_S)


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they end: a client library may turn a cancellation into an error of its own."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
