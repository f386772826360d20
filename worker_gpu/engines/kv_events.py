"""What an engine says about its KV cache, so that others can know what it holds without asking.

The words are vLLM's. Events come in order and are numbered without gaps: whoever applies them all, from the first
one on, holds exactly the cache's content, and a gap tells a reader that he missed some and must begin again
(`Engine.tell_again`). In the simulated engine a block's parent is always stored when the block is, so the content is a
tree, and a hash is stored once at a time. vLLM may hold copies of a block on the GPU: it tells of each that it stores,
and of each that it removes, so a hash is gone only once it was removed as often as it was stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

GPU, CPU, DISK = "GPU", "CPU", "DISK"


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Blocks that follow one another are in the cache now; `parent` comes before the first, or None at a chain's start.

    `token_count` counts the tokens of all blocks together, `block_size` those of one; both are 0 where the engine does
    not know, and then nor does it know the parent: vLLM's disk tier, of what an earlier process left there. `medium` is
    the memory tier.
    """

    block_hashes: tuple[bytes, ...]
    parent: bytes | None
    token_count: int
    block_size: int
    medium: str = GPU


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """These blocks, or a copy of each, are no longer in the cache."""

    block_hashes: tuple[bytes, ...]
    medium: str = GPU


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing is in the cache any more: on one tier, or on any if `medium` is None."""

    medium: str | None = None


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared
Subscriber = Callable[[int, KvEvent], None]


class KvEvents:
    """Numbers events from 0 and passes each to all subscribers at once, as `subscriber(number, event)`.

    A subscriber must return soon and must not raise. If it causes further events, these come after this one for all.
    """

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []
        self._next_number = 0
        self._queue: deque[tuple[int, KvEvent]] = deque()
        self._is_passing_on = False

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with every event from now on; earlier ones are not repeated."""
        self._subscribers.append(subscriber)

    def publish(self, event: KvEvent) -> None:
        """Pass an event on."""
        self._queue.append((self._next_number, event))
        self._next_number += 1
        if self._is_passing_on:
            return
        self._is_passing_on = True
        try:
            while self._queue:
                number, next_event = self._queue.popleft()
                for subscriber in self._subscribers:
                    subscriber(number, next_event)
        finally:
            self._is_passing_on = False

    def skip(self) -> None:
        """Have subscribers notice, at the next event, that there was one which nobody knows."""
        self._next_number += 1
