"""Computing what is wished for while there is nothing better to do.

Gateways wish that so many workers have a profile computed: because a version is about to become active, or because its agent
is pinned. A worker that has room asks the queue for such a profile, of which a copy is missing, and computes its static part: a
request of one token, which nobody waits for. Then the KV cache has it, and the worker's next report says so. Nobody hands out the
work: the queue's script notes who computes what, for a while, so that a worker that dies in the middle is in nobody's way.

Computing does not always help, so it is bounded:

- What was computed here is kept within `KEPT_SHARE` of the KV cache: wishes that do not fit together would evict each other for
  ever.
- A profile that was computed here is not computed here again for `REST_S`, should it be evicted at once, and one that failed
  not for `FAILED_REST_S`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tasks.errors import GatewayError
from tasks.logs import get_logger
from tasks.metrics import worker as metrics
from tasks.queueing.keys import QueueKeys, script
from tasks.queueing.pull import Wish
from worker_gpu.admission import Share
from worker_gpu.asking import cache_salt_of, one_token, run_unasked
from worker_gpu.parts import Parts
from worker_gpu.profiles import StaticPart

logger = get_logger(__name__)
ASK_EVERY_S: Final = 1.0
KEPT_SHARE: Final = 0.75
REST_S: Final = 10.0
FAILED_REST_S: Final = 60.0
#: How long computing may take; and then, until the KV cache's own events tell that it is there.
LONGEST_S: Final = 300.0
KNOWN_S: Final = 2.0
_LOOK_EVERY_S: Final = 0.02
#: Where the engine does not tell how much its cache holds.
_ANY: Final = 2**53


@dataclass(frozen=True, slots=True)
class _Kept:
    """What was computed here: so many tokens, not to be computed again before `rest_until`, on the loop's clock."""

    tokens: int
    rest_until: float


class Warmer:
    """Computes wished-for profiles, on the engine's loop, with the worker's `parts`.

    `wish` says what the worker would take; `freed` is called when it may take more than before.
    """

    def __init__(self, parts: Parts, keys: QueueKeys, wish: Callable[[], Wish], freed: Callable[[], object]) -> None:
        self._keys = keys
        self._script = parts.redis.register_script(script("warm"))
        self._engine, self._admission, self._cache = parts.engine, parts.admission, parts.cache
        self._static_parts, self._salt = parts.runner.static_parts, parts.runner.salt
        self._wish, self._freed = wish, freed
        self._kept: dict[str, _Kept] = {}
        self._given_up: list[str] = []

    async def warm_for_ever(self) -> None:
        """Ask, and compute. Raises redis.RedisError when Redis does not answer; then call it again."""
        while True:
            if (profile := await self._ask()) is None:
                await asyncio.sleep(ASK_EVERY_S)
            else:
                await self._try(profile)

    async def _ask(self) -> str | None:
        """Return a profile to compute, if there is one."""
        now = asyncio.get_running_loop().time()
        self._kept = {
            profile: kept
            for profile, kept in self._kept.items()
            if now < kept.rest_until or (kept.tokens and self._cache.cached(profile)[0] >= kept.tokens)
        }
        metrics.WARM.set(sum(kept.tokens > 0 for kept in self._kept.values()))
        spared = [profile for profile, kept in self._kept.items() if now < kept.rest_until]
        capacity = self._engine.limits.cache_tokens
        room = capacity * KEPT_SHARE - sum(kept.tokens for kept in self._kept.values()) if capacity else _ANY
        told = self._wish().to_json(), int(room), json.dumps(spared), json.dumps(self._given_up)
        found = await self._script(keys=self._keys.of_scripts, args=(self._keys.root, *told))
        self._given_up.clear()
        return None if found is None else found.decode()

    async def _try(self, profile: str) -> None:
        """Compute a profile, and note what came of it."""
        loop = asyncio.get_running_loop()
        began, tokens, outcome = loop.time(), 0, "failed"
        try:
            async with asyncio.timeout(LONGEST_S):
                part = await self._static_parts.get(profile)
                await self._compute(profile, part)
                if await self._is_there(profile, len(part.token_ids)):
                    tokens, outcome = len(part.token_ids), "warmed"
                else:
                    outcome = "not_kept"
        except (GatewayError, TimeoutError) as error:
            logger.warning("a wished-for profile could not be computed", error=type(error).__name__)
        except Exception as error:  # nobody waits for it, and requests must go on; its text may quote the prompt
            logger.error("unexpected error while a profile was warmed", error=type(error).__name__)
        metrics.WARMED.labels(outcome).inc()
        logger.info("a wished-for profile was tried", outcome=outcome, seconds=round(loop.time() - began, 2))
        if outcome != "warmed":
            self._given_up.append(profile)
        rest_s = REST_S if outcome == "warmed" else FAILED_REST_S
        self._kept[profile] = _Kept(tokens, loop.time() + rest_s)

    async def _compute(self, profile: str, part: StaticPart) -> None:
        """Have the engine compute a static part."""
        cache_salt = cache_salt_of(part.organization, self._salt)
        self._cache.register(profile, part.chain, len(part.token_ids), part.token_ids, cache_salt)
        request = one_token(f"warm-{profile}", part.token_ids, cache_salt)
        share, cached = Share("", profile, len(part.token_ids)), self._cache.cached(profile)[0]
        await run_unasked(self._engine, self._admission, request, cached, share, self._freed)

    async def _is_there(self, profile: str, tokens: int) -> bool:
        """Tell whether the KV cache has a profile, as it tells itself; its events may take a moment."""
        until = asyncio.get_running_loop().time() + KNOWN_S
        while self._cache.cached(profile)[0] < tokens:
            if asyncio.get_running_loop().time() >= until:
                return False
            await asyncio.sleep(_LOOK_EVERY_S)
        return True
