"""What an engine says about its KV cache, so that others can know what it holds without asking.

The words are vLLM's. Events come in order and are numbered without gaps: whoever applies them all, from the first
one on, holds exactly the cache's content, and a gap tells a reader that he missed some and must begin again. In the
simulated engine a block's parent is always stored when the block is, so the content is a tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GPU = "GPU"


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Blocks that follow one another are in the cache now; `parent` comes before the first, or None at a chain's start.

    `token_count` counts the tokens of all blocks together, `block_size` those of one. `medium` is the memory tier.
    """

    block_hashes: tuple[bytes, ...]
    parent: bytes | None
    token_count: int
    block_size: int
    medium: str = GPU


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """These blocks are no longer in the cache."""

    block_hashes: tuple[bytes, ...]
    medium: str = GPU


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing is in the cache any more."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared
Subscriber = Callable[[int, KvEvent], None]


class KvEvents:
    """Numbers events from 0 and passes each to all subscribers at once, as `subscriber(number, event)`.

    A subscriber must return soon, must not raise, and must not use the engine.
    """

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []
        self._next_number = 0

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with every event from now on; earlier ones are not repeated."""
        self._subscribers.append(subscriber)

    def publish(self, event: KvEvent) -> None:
        """Pass an event on."""
        number = self._next_number
        self._next_number += 1
        for subscriber in self._subscribers:
            subscriber(number, event)
