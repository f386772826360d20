"""Counting what this worker's KV cache had of the profiles that requests asked for, and adding it up in Redis.

These are figures for people: what was counted in the last seconds of a worker that is killed is lost.
"""

from __future__ import annotations

import asyncio
import time
from itertools import islice

from redis.asyncio import Redis

from tasks import cache_hits
from tasks.cache_hits import Hits
from worker_gpu.profiles import StaticPart

INTERVAL_S = 2.0
#: Links that are counted while Redis is away. Beyond these, new ones are not.
_MAX_LINKS = 10_000
#: Links that are told at a time: Redis does nothing else meanwhile, for about 7 µs a link.
_AT_ONCE = 200


class HitCounter:
    """Counts by link of a profile's chain. To be used on the loop, all of it."""

    def __init__(self) -> None:
        self._counted: dict[str, Hits] = {}

    def note(self, static_profile_hash: str, static: StaticPart, cached_tokens: int, block_size: int) -> None:
        """Count a request whose answer began, and how many tokens of its prompt were cached, in blocks of `block_size`."""
        at = time.time()
        for link, tokens in (*static.chain, (static_profile_hash, len(static.token_ids))):
            # What does not fill a block cannot be cached.
            if tokens < block_size or (link not in self._counted and len(self._counted) >= _MAX_LINKS):
                continue
            whole = cached_tokens >= tokens - tokens % block_size
            one = Hits(1, int(whole), tokens, min(cached_tokens, tokens), at)
            self._counted[link] = self._counted.get(link, Hits()) + one

    async def tell_for_ever(self, client: Redis, prefix: str) -> None:
        """Add up in Redis what is counted. Raises redis.RedisError when Redis does not take it; then call it again."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            await self.tell(client, prefix)

    async def tell(self, client: Redis, prefix: str) -> None:
        """Add up in Redis what was counted since the last time. Raises redis.RedisError; what was not added is kept."""
        add = client.register_script(cache_hits.ADD)
        while part := dict(islice(self._counted.items(), _AT_ONCE)):
            for link in part:
                del self._counted[link]
            try:
                await add(*cache_hits.added(prefix, part, time.time()))
            except BaseException:
                for link, hits in part.items():
                    self._counted[link] = hits + self._counted.get(link, Hits())
                raise
