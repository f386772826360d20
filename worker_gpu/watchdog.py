"""Finding out that the engine is dead, or might as well be.

An engine that ended says so. One that hangs, in a kernel or a driver, says nothing: its processes live, and its requests
wait for ever. But an engine that runs requests takes steps, so it is taken for hung when it has requests and takes none
for a while. The while is counted in the watchdog's own rounds: where this process itself was stopped or kept busy, the
engine's reports wait to be read, and it must not be the one to blame.
"""

from __future__ import annotations

import asyncio

from tasks.errors import EngineDead
from worker_gpu.engines.base import Engine

_ROUND_S = 1.0
#: At least so many rounds must pass without a step.
_ROUNDS = 8
#: How much of a round that took too long counts, in rounds.
_LONGEST_ROUND = 2


class Watchdog:
    """Watches an engine; `stall_s` is how long it may go without a step while it has requests, in seconds."""

    def __init__(self, engine: Engine, stall_s: float) -> None:
        self._engine = engine
        self._stall_s = stall_s
        self._round_s = min(_ROUND_S, stall_s / _ROUNDS)

    async def watch(self) -> None:
        """Watch for ever. Raises EngineDead at most a round after the engine ended, or has been hung for `stall_s`."""
        clock = asyncio.get_running_loop().time
        quiet_s, seen, before = 0.0, self._engine.steps, clock()
        while True:
            await asyncio.sleep(self._round_s)
            await self._engine.check_health()
            passed_s, before = clock() - before, clock()
            if not self._engine.busy or self._engine.steps != seen:
                quiet_s, seen = 0.0, self._engine.steps
                continue
            quiet_s += min(passed_s, _LONGEST_ROUND * self._round_s)
            if quiet_s >= self._stall_s:
                raise EngineDead("the model engine hangs")
