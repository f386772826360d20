"""Which blocks may come from disk into host RAM for which request, so that they do not push one another out.

vLLM asks for all blocks of a prompt that are on disk, has them brought into RAM, and copies them to the GPU once all are there.
Until then nothing keeps them in RAM: a prompt that is longer than RAM's tier, or several that are it together, would push out its
own first blocks with its last, and begin again, for ever. So no more blocks are under way than half of RAM holds, and
none twice for the same request. What is refused is computed.
"""

from __future__ import annotations

from collections import defaultdict


class Grants:
    """Counts the blocks that are on their way to requests; `limit` is how many there may be."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._total = 0
        self._granted: defaultdict[str, set[bytes]] = defaultdict(set)

    def grant(self, request_id: str, key: bytes) -> bool:
        """Tell whether the block may be loaded for this request: only once, since what comes back was lost on the way."""
        granted = self._granted[request_id]
        if key in granted or self._total >= self._limit:
            return False
        granted.add(key)
        self._total += 1
        return True

    def end(self, request_id: str) -> None:
        """Note that a request has its blocks, or wants none any more."""
        self._total -= len(self._granted.pop(request_id, ()))
