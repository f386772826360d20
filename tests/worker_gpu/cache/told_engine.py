"""An engine that runs nothing: its cache holds what a test says, and it tells of it, or forgets to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import cast

from worker_gpu.engines.base import Engine, EngineLimits
from worker_gpu.engines.kv_events import CPU, DISK, GPU, AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, KvEvents

BLOCK_SIZE = 2
#: One thing after another that a KV cache may be: a word of letters for tokens, two a block.
Word = str


def tokens_of(word: Word) -> list[int]:
    """Return the token ids of a word."""
    return list(word.encode())


def blocks_of(word: Word) -> list[bytes]:
    """Return the hashes of a word's full blocks: each is the word up to its end."""
    return [word[:end].encode() for end in range(BLOCK_SIZE, len(word) + 1, BLOCK_SIZE)]


class ToldEngine:
    """`held` is what it holds by medium, with the number of copies of each block. `tells` can be turned off."""

    limits = EngineLimits(max_model_len=100, max_num_seqs=8, block_size=BLOCK_SIZE, cache_tokens=100)

    def __init__(self) -> None:
        self.events = KvEvents()
        self.subscribe = self.events.subscribe
        self.held: dict[str, Counter[bytes]] = {GPU: Counter(), CPU: Counter(), DISK: Counter()}
        self.tells = True
        self.told_again = 0

    def block_hashes(self, token_ids: Sequence[int], cache_salt: str) -> list[bytes]:
        return blocks_of(cache_salt + bytes(token_ids).decode())

    def tell_again(self) -> None:
        self.told_again += 1

    def store(self, blocks: Sequence[bytes], medium: str = GPU) -> None:
        """Store a copy of each, if there may be more than one."""
        for block in blocks:
            self.held[medium][block] = self.held[medium][block] + 1 if medium == GPU else 1
        self._tell(BlockStored(tuple(blocks), None, len(blocks) * BLOCK_SIZE, BLOCK_SIZE, medium))

    def remove(self, block: bytes, medium: str = GPU) -> None:
        """Remove a copy of a block that is held."""
        self.held[medium][block] -= 1
        self.held[medium] += Counter()  # It keeps what is above 0.
        self._tell(BlockRemoved((block,), medium))

    def clear(self) -> None:
        for copies in self.held.values():
            copies.clear()
        self._tell(AllBlocksCleared())

    def hit(self, word: Word) -> None:
        """Tell of the blocks that a prompt finds, without storing any, as vLLM does when asked to."""
        if found := tuple(block for block in takewhile(self.held[GPU].__contains__, blocks_of(word))):
            self._tell(BlockStored(found, None, len(found) * BLOCK_SIZE, BLOCK_SIZE))

    def leading(self, word: Word) -> tuple[int, int, int]:
        """Return how many of a word's first blocks are truly there, by tier."""
        path, gpu, ram, disk = blocks_of(word), 0, 0, 0
        while gpu < len(path) and path[gpu] in self.held[GPU]:
            gpu += 1
        ram = disk = gpu
        while ram < len(path) and path[ram] in self.held[CPU]:
            ram += 1
        while disk < len(path) and (path[disk] in self.held[CPU] or path[disk] in self.held[DISK]):
            disk += 1
        return gpu, ram, disk

    def as_engine(self) -> Engine:
        """Return it as an engine, of which an index needs no more."""
        return cast("Engine", self)

    def _tell(self, event: KvEvent) -> None:
        if self.tells:
            self.events.publish(event)
        else:
            self.events.skip()
