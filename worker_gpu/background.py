"""Tasks that run beside the requests for as long as the worker does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import redis

from tasks.logs import get_logger

logger = get_logger(__name__)
_RETRY_S = 0.5
_CANCEL_AGAIN_S = 0.5


async def through_outages(work: Callable[[], Awaitable[None]]) -> None:
    """Do `work`, and again whenever it ends, be it because Redis is away."""
    while True:
        try:
            await work()
        except redis.RedisError as error:
            logger.warning("redis did not take it", error=type(error).__name__)
        await asyncio.sleep(_RETRY_S)


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they end: a client library may turn a cancellation into an error of its own."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
