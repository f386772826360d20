"""Using profiles again that the KV cache is about to let go, beside the requests; which ones, and why, is in `freshness`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from tasks.errors import GatewayError
from tasks.logs import get_logger
from tasks.metrics import worker as metrics
from worker_gpu.admission import Memory, Share
from worker_gpu.asking import run_unasked
from worker_gpu.freshness import LOOK_EVERY_S, Use, one_token_of
from worker_gpu.parts import Parts

logger = get_logger(__name__)
#: An engine that takes longer for one token has other sorrows.
LONGEST_S: Final = 30.0


class Refresher:
    """Asks the engine, on its loop, for one token of each profile that is due; `freed` is called when it is done."""

    def __init__(self, parts: Parts, freed: Callable[[], object]) -> None:
        self._engine, self._admission, self._cache = parts.engine, parts.admission, parts.cache
        self._freshness = parts.runner.freshness
        self._freed = freed

    async def refresh_for_ever(self) -> None:
        """Look, and ask. A profile is not asked for again while it is being asked for."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            facts, now = self._cache.facts, asyncio.get_running_loop().time()
            memory = Memory(facts.capacity_tokens, facts.free_tokens)
            left = self._admission.beside_running(self._engine.load, memory)
            due = self._freshness.due(left.capacity_tokens, left.free_tokens, self._admission.places, now, self._held)
            if due:
                await asyncio.gather(*(self._use(profile, use) for profile, use in due.items()))

    def _held(self, profile: str) -> int:
        return self._cache.cached(profile)[0]

    async def _use(self, profile: str, use: Use) -> None:
        """Have the engine use a profile. Nobody waits for it, so nothing that goes wrong matters."""
        request, share = one_token_of(profile, use), Share("", profile, len(use.token_ids))
        try:
            async with asyncio.timeout(LONGEST_S):
                await run_unasked(self._engine, self._admission, request, share.static_tokens, share, self._freed)
            metrics.REFRESHED.inc()
        except (GatewayError, TimeoutError) as error:
            logger.warning("a profile could not be used again", error=type(error).__name__)
        except Exception as error:  # requests must go on; its text may quote the prompt
            logger.error("unexpected error while a profile was used again", error=type(error).__name__)
