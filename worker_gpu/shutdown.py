"""How a worker comes to its end: in one of two ways, and both let go of what runs before the process ends.

- **Drained**: from `drain` on nothing is begun. What was not begun goes back at once, what runs has until the grace
  time is over; the rest is given back, excused.
- **Dead**: the engine died or hangs. Everything is given back at once, and the attempts count.

Giving back needs the database and Redis. Where they are away it is given up after a few seconds: the leases then end by
themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tasks.logs import get_logger
from worker_gpu.background import cancel
from worker_gpu.parts import Parts
from worker_gpu.scopes import Outcome

logger = get_logger(__name__)

#: How long giving back may take, all told.
HAND_BACK_S = 3.0
#: How long Celery and the engine may then take to end.
END_S = 20.0
#: The same, once the engine is dead: there is nothing left to be gentle with.
DEAD_END_S = 3.0


class Shutdown:
    """Lets go of what runs, which the runtime keeps in `running`. Made, and used, on the loop.

    `reporting` is the task that tells the queue what the cache holds; `grace_s` is what a drain leaves to what runs. For
    `on_dead` and `on_overdue` see `Runtime`.
    """

    def __init__(
        self,
        parts: Parts,
        running: set[asyncio.Task[Outcome]],
        reporting: asyncio.Task[None],
        grace_s: float,
        on_dead: Callable[[], None],
        on_overdue: Callable[[], None],
    ) -> None:
        self._parts = parts
        self._running = running
        self._reporting = reporting
        self._grace_s = grace_s
        self._on_dead = on_dead
        self._on_overdue = on_overdue
        self._heart, self._scopes = parts.heart, parts.runner.scopes
        self._loop = asyncio.get_running_loop()
        self._leaving: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    @property
    def has_begun(self) -> bool:
        """Tell whether nothing may be begun any more."""
        return self._leaving is not None

    def drain(self, hurry: bool) -> None:
        """Begin nothing from now on, and let go of what runs when the grace time is over, or at once."""
        if hurry:
            self._hurry.set()
        if self._leaving is None:
            self._heart.become("draining")
            self._fall_silent()
            self._leaving = self._loop.create_task(self._let_go())

    def die(self, why: str) -> None:
        """Give everything back at once: the engine is of no use."""
        if self._heart.state != "dead":
            logger.critical("the engine is of no use any more", why=why)
            self._heart.become("dead")
            self._fall_silent()
            if self._leaving is not None:
                self._leaving.cancel()
            self._leaving = self._loop.create_task(self._perish())

    async def wait(self) -> None:
        """Return when what ran is let go, and nothing is asked for or reported."""
        # It may be replaced meanwhile, by the engine's death.
        while self._leaving is not None and not self._leaving.done():
            await asyncio.wait((self._leaving,))
        await self._silence

    def _fall_silent(self) -> None:
        """Ask for nothing more, and have the queue give to others what this worker's cache holds."""
        self._parts.pulling.leave()

        async def unreport() -> None:
            await cancel([self._reporting])
            await self._parts.reporter.stop()

        self._silence = self._loop.create_task(unreport())

    async def _let_go(self) -> None:
        """Wait for what runs, then give back what is left."""
        self._scopes.stop_all("worker_draining", but_begun=True)
        logger.info("draining", seconds=self._grace_s, count=len(self._running))
        hurry = self._loop.create_task(self._hurry.wait())
        until = self._loop.time() + self._grace_s
        while self._running and not hurry.done() and (left_s := until - self._loop.time()) > 0:
            await asyncio.wait((*self._running, hurry), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        self._scopes.stop_all("worker_draining")
        await self._wait_for_returns()
        self._loop.call_later(END_S, self._on_overdue)

    async def _perish(self) -> None:
        self._scopes.stop_all("engine_dead")
        await self._wait_for_returns()
        self._on_dead()
        self._loop.call_later(DEAD_END_S, self._on_overdue)

    async def _wait_for_returns(self) -> None:
        """Wait, not for long, until what was stopped is given back."""
        if self._running:
            await asyncio.wait(self._running, timeout=HAND_BACK_S)
