"""Keeping profiles in the KV cache that would be pushed out by what nobody asks for again.

An engine evicts what was used least recently, whatever it is. Every request leaves blocks of its own behind, those of its task
and its answer, which are hardly ever found again and yet are younger than a profile that was used some seconds ago. So where
profiles nearly fill the cache, one that is asked for every few seconds is evicted all the same, and computed for each request.

Using it makes it young: a request for one token, whose prompt is the profile, finds all of it cached and costs the engine a
single token. It is due once the engine has stored `STORED_SHARE` of what the cache has room for beside profiles and what runs,
since the profile was used. Nothing is due where nothing is stored, so an idle engine stays idle.

It is bounded: only profiles that requests used in the last `KEPT_S` are kept, the latest first, and no more of them than
the cache holds beside what runs. Beyond that, keeping one would only push out another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tasks.logs import get_logger
from worker_gpu.asking import one_token
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.kv_events import GPU, BlockStored, KvEvent

logger = get_logger(__name__)
STORED_SHARE: Final = 0.25
KEPT_S: Final = 60.0
#: How often it is looked whether one is due, and how many are asked for at once: as many as there is room for beside requests,
#: and a few where there is none.
LOOK_EVERY_S: Final = 0.25
FEW: Final = 8


@dataclass(slots=True)
class Use:
    """A profile's last use: its static part, when a request used it, and what the engine had stored when anybody did."""

    token_ids: Sequence[int]
    cache_salt: str
    at: float
    stored: int


class Freshness:
    """Which profiles are due. It is told of uses, and hears the engine's events; it reads no clock."""

    def __init__(self) -> None:
        self._uses: OrderedDict[str, Use] = OrderedDict()
        self._stored = 0

    def hear(self, _number: int, event: KvEvent) -> None:
        """Take one of the engine's events."""
        if isinstance(event, BlockStored) and event.medium == GPU:
            self._stored += event.token_count

    def use(self, profile: str, token_ids: Sequence[int], cache_salt: str, now: float) -> None:
        """Note that a request uses a profile, at a time in seconds."""
        self._uses[profile] = Use(token_ids, cache_salt, now, self._stored)
        self._uses.move_to_end(profile)

    def due(
        self, room_tokens: int, free_tokens: int, places: int, now: float, held: Callable[[str], int]
    ) -> dict[str, Use]:
        """Return the profiles that should be used again now, and note that they are: `places` of them, or a few.

        Beside what runs, the cache holds `room_tokens`, of which `free_tokens` are no profile's; `held` tells how many tokens of
        a profile are there. What is not wholly there is not due: it would have to be computed.
        """
        while self._uses and next(iter(self._uses.values())).at < now - KEPT_S:
            self._uses.popitem(last=False)
        found: list[tuple[str, Use]] = []
        left = room_tokens
        for profile, use in reversed(self._uses.items()):
            left -= len(use.token_ids)
            if left < 0:
                break
            if self._stored - use.stored > STORED_SHARE * free_tokens and held(profile) >= len(use.token_ids):
                found.append((profile, use))
        # Whose turn to go comes first.
        found.sort(key=lambda each: each[1].stored)
        chosen = dict(found[: max(places, FEW)])
        for use in chosen.values():
            use.stored = self._stored
        return chosen


def one_token_of(profile: str, use: Use) -> GenerationRequest:
    """Return the request that uses a profile. A token follows it, since the last one of a prompt is never found cached."""
    return one_token(f"fresh-{profile}", [*use.token_ids, use.token_ids[-1]], use.cache_salt)
