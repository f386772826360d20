"""Telling the queue what this worker's KV cache holds, and how it is.

The queue decides by these reports which requests are best run here, and what is found here need not be computed elsewhere. So what
has changed is told at once, though never sooner than `JOIN_S` after the report before; without a change the worker says
every `INTERVAL_S` that it lives. The first report holds everything, each later one what changed since the one before it, under the
next number. Redis, which may have been emptied or may have missed one, then asks for everything again; so it gets all
that is known whenever the fate of a report is not known.

Reports tell as well how many tokens were said to each organization, by which the queue shares out the fleet. A report whose answer
was lost tells them again: to count some twice is a smaller fault than to count none.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import redis
from redis.asyncio import Redis

from tasks.logs import get_logger
from tasks.queueing.keys import QueueKeys, script
from tasks.queueing.pull import Held, Report

logger = get_logger(__name__)
INTERVAL_S: Final = 1.0
JOIN_S: Final = 0.05
#: How long the last word may take, in seconds.
_STOP_S: Final = 1.0


class Index(Protocol):
    """What is known of the KV cache: of each link of the profiles that were used, how many tokens of its prefix are held."""

    def changes(self) -> Mapping[str, Held]:
        """Return what changed since the last call; nothing held of what is gone."""
        ...

    def everything(self) -> Mapping[str, Held]:
        """Return all that is held. The next `changes` are those after it."""
        ...


class Reporter:
    """Sends the reports of `worker` on what `index` has. To be used on the loop, all of it.

    `facts` returns what is told of the worker besides. `served` are the output tokens that the engine said to each
    organization; those that were told are taken out.
    """

    def __init__(
        self,
        client: Redis,
        keys: QueueKeys,
        worker: str,
        index: Index,
        facts: Callable[[], Mapping[str, Any]],
        served: Counter[str],
    ) -> None:
        self._keys, self._worker, self._index, self._facts, self._served = keys, worker, index, facts, served
        self._report, self._unreport = (client.register_script(script(name)) for name in ("report", "unreport"))
        self._epoch = secrets.token_hex(8)
        self._number = 0
        self._full = True
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Note that the index has changed, or the facts, in a way that others wait for."""
        self._changed.set()

    async def report_for_ever(self) -> None:
        """Report. Raises redis.RedisError when Redis does not take it; then call it again."""
        while True:
            self._changed.clear()
            try:
                await self._tell()
            except redis.RedisError:
                raise
            except Exception as error:
                # What is told here is advice, which requests do without.
                logger.error("a report could not be made", error=type(error).__name__)
            await asyncio.sleep(JOIN_S)
            try:
                await asyncio.wait_for(self._changed.wait(), INTERVAL_S - JOIN_S)
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """Have the queue forget this worker, which ends. Does not take long, whatever Redis does."""
        try:
            async with asyncio.timeout(_STOP_S):
                await self._unreport(keys=self._keys.of_scripts, args=[self._keys.root, self._worker])
        except (redis.RedisError, TimeoutError):
            logger.warning("the queue could not be told of the worker's end; it finds out by itself")

    async def _tell(self) -> None:
        """Send one report, and a full one if Redis asks for it."""
        while True:
            full, served = self._full, dict(self._served)
            self._number += 1
            report = Report(
                worker=self._worker,
                epoch=self._epoch,
                number=self._number,
                full=full,
                cache=self._index.everything() if full else self._index.changes(),
                facts={"epoch": self._epoch, **self._facts()},
                served=served,
            )
            # Until Redis says otherwise.
            self._full = True
            taken = await self._report(keys=self._keys.of_scripts, args=[self._keys.root, report.to_json()])
            if taken:
                self._full = False
                self._served -= Counter(served)
                return
            if full:
                # It takes every full one.
                raise redis.ResponseError("the report was not taken")
