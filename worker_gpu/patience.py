"""Waiting for MetaQore to answer, so that a short outage does not end what is queued.

Where governance cannot learn how a request's project stands, it refuses the request, and says that asking later may
help. The client of a request that is admitted cannot be told to send it again, so it is asked again in its place: soon
at first, then less often, and never in step with others. Meanwhile the message is back in the queue, delayed, and holds
no place of any worker; whichever takes it next asks.

Since that may be another one each time, Redis remembers since when a request waits: in a key that is made at the first
refusal and ends by itself, so that its remaining life tells how long that was. Only Redis's own clock is read.
"""

from __future__ import annotations

import random

import redis
from redis.asyncio import Redis

from tasks.errors import ProjectUnverified
from tasks.lifecycle import Refusal

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 5.0
#: A request that is looked at again so late after its patience was over begins anew.
_REMEMBERED_S = 600.0


def is_unanswered(refusal: Refusal | None) -> bool:
    """Tell whether the refusal is for want of an answer, so that asking later may help."""
    return refusal is not None and refusal.code == ProjectUnverified.code


class Patience:
    """Says how long a request is left alone before MetaQore is asked about it again, for up to `patience_s` in all."""

    def __init__(self, client: Redis, prefix: str, patience_s: float) -> None:
        self._client = client
        self._prefix = prefix
        self._patience_s = patience_s

    async def pause_s(self, request_id: str) -> float | None:
        """Return for how long, in seconds, or None if its patience is over.

        The pause is drawn between half and all of its length, which doubles; that is as long as it has waited so far.
        """
        if not self._patience_s:
            return None
        try:
            waited_s = await self._waited_s(request_id)
        except redis.RedisError:
            return LONGEST_PAUSE_S
        if (left_s := self._patience_s - waited_s) <= 0:
            return None
        return min(left_s, random.uniform(0.5, 1) * min(max(waited_s, FIRST_PAUSE_S), LONGEST_PAUSE_S))

    async def _waited_s(self, request_id: str) -> float:
        key, whole_s = f"{self._prefix}patience:{request_id}", self._patience_s + _REMEMBERED_S
        async with self._client.pipeline(transaction=True) as pipe:
            pipe.set(key, "", nx=True, px=int(whole_s * 1000))
            pipe.pttl(key)
            _, left_ms = await pipe.execute()
        return max(0.0, whole_s - int(left_ms) / 1000)
