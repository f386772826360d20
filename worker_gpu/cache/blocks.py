"""Which blocks the engine's KV cache holds, on which tier, as its events tell.

On the GPU, vLLM may hold several copies of a block, and tells of each; a block is there while one of them is. The slower tiers
hold a block once.

Events are numbered without gaps. Where one is missing, nothing is certain: a block may have gone without a word. So all is
forgotten, and the engine asked to tell again. What it tells then may be told twice (vLLM: each time a prompt finds the block),
so from then on copies are not counted, and a block counts as gone when its first copy goes. That errs on the safe side: what
is counted as cached is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, takewhile

from tasks.logs import get_logger
from tasks.prompts.radix import Depths, Tier
from worker_gpu.engines.kv_events import CPU, DISK, GPU, BlockRemoved, BlockStored, KvEvent

logger = get_logger(__name__)

#: Blocks of one tier that are known, about 100 bytes each. The GPU has fewer; of a large disk, those told of first are forgotten.
MAX_BLOCKS = 1_000_000
_TIERS = {GPU: Tier.GPU, CPU: Tier.RAM, DISK: Tier.DISK}


class HeldBlocks:
    """Follows an engine's events from number 0 on. `touched` is called with the hashes of blocks that came or went.

    `lost` is called when events were missed, after everything was forgotten: it should have the engine tell again.
    """

    def __init__(self, touched: Callable[[Iterable[bytes]], object], lost: Callable[[], object]) -> None:
        self.losses = 0
        self._touched, self._lost = touched, lost
        self._next_number = 0
        #: By tier, each block's copies.
        self._copies: tuple[dict[bytes, int], ...] = ({}, {}, {})

    def apply(self, number: int, event: KvEvent) -> None:
        """Take the engine's next event."""
        missed = number - self._next_number
        self._next_number = number + 1
        if missed:
            logger.warning("KV events were missed: the cache is told again", count=missed)
            self.losses += 1
            self._clear(Tier)
        if isinstance(event, BlockStored):
            self._store(event)
        elif isinstance(event, BlockRemoved):
            self._remove(event)
        else:
            self._clear(Tier if event.medium is None else [_TIERS[event.medium]])
        if missed:
            self._lost()

    def count(self, tier: Tier) -> int:
        """Return how many blocks a tier holds, copies counted once. Any thread may ask."""
        return len(self._copies[tier])

    def leading(self, path: Sequence[bytes]) -> Depths:
        """Return how many of a prompt's first blocks are on the GPU, there or behind that in RAM, or on disk as well.

        As vLLM looks for them: what the GPU has after a gap in its blocks is not used.
        """
        gpu, ram, disk = self._copies
        on_gpu = sum(1 for _ in takewhile(gpu.__contains__, path))
        if not ram and not disk:
            return on_gpu, on_gpu, on_gpu
        rest = path[on_gpu:]
        in_ram = sum(1 for _ in takewhile(ram.__contains__, rest))
        on_disk = sum(1 for _ in takewhile(lambda block: block in ram or block in disk, rest))
        return on_gpu, on_gpu + in_ram, on_gpu + on_disk

    def _store(self, event: BlockStored) -> None:
        copies = self._copies[tier := _TIERS[event.medium]]
        counts = tier is Tier.GPU and not self.losses
        for block in event.block_hashes:
            copies[block] = copies.get(block, 0) + 1 if counts else 1
        while len(copies) > MAX_BLOCKS:
            del copies[oldest := next(iter(copies))]
            self._touched([oldest])
        self._touched(event.block_hashes)

    def _remove(self, event: BlockRemoved) -> None:
        copies = self._copies[_TIERS[event.medium]]
        for block in event.block_hashes:
            if (left := copies.pop(block, 1) - 1) > 0:
                copies[block] = left
        self._touched(event.block_hashes)

    def _clear(self, tiers: Iterable[Tier]) -> None:
        gone = [self._copies[tier] for tier in tiers]
        held = list(chain.from_iterable(gone))
        for copies in gone:
            copies.clear()
        self._touched(held)
