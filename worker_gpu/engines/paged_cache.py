"""A paged KV cache without the pages: which blocks of an accelerator's memory are in use, and what they hold.

Memory is a fixed number of blocks, each for the keys and values of `block_size` tokens. A running sequence refers to
the blocks of its tokens, and several sequences may refer to the same block. A full block is known by a hash over the
cache salt and all tokens up to its end, so equal hashes mean an equal prefix. As in vLLM, a block that nobody refers
to any more keeps its hash until its memory is needed:

    blank   free, holds nothing anybody could ask for; taken first
    idle    free, but known by its hash; taken when no blank block is left, the least recently used first
    in use  referred to; never taken away

`release` frees a sequence's last block first, so within a chain the end is forgotten before the beginning, which
more prompts share. Unlike in vLLM, a sequence that computes what is already known gives its own copy up for the known
block (see `store`). Whoever refers to a block therefore refers to all known blocks before it, and eviction can only
take a block that no other known block follows: what is known is always a tree with all its roots.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import KeysView, Sequence
from itertools import takewhile

from worker_gpu.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvents


class BlockPool:
    """The blocks, by number, with how often each is referred to and the hash it is known by.

    Events go to `events`. With `caching` off, nothing is ever known.
    """

    def __init__(self, num_blocks: int, block_size: int, events: KvEvents, *, caching: bool = True) -> None:
        self._block_size = block_size
        self._events = events
        self._caching = caching
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._parents: list[bytes | None] = [None] * num_blocks
        self._known: dict[bytes, int] = {}
        self._blank = list(range(num_blocks))
        #: With their hashes, the least recently used first.
        self._idle: OrderedDict[int, bytes] = OrderedDict()

    @property
    def free(self) -> int:
        """Return how many blocks `allocate` could give."""
        return len(self._blank) + len(self._idle)

    @property
    def in_use(self) -> set[int]:
        """Return the blocks that somebody refers to."""
        return {block for block, count in enumerate(self._references) if count}

    @property
    def known(self) -> KeysView[bytes]:
        """Return the hashes that `match` would find."""
        return self._known.keys()

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest known beginning of a chain, without referring to them."""
        known = self._known
        return [known[block_hash] for block_hash in takewhile(known.__contains__, hashes)]

    def free_beside(self, blocks: Sequence[int]) -> int:
        """Return how many blocks would be free if these were referred to."""
        return self.free - sum(not self._references[block] for block in blocks)

    def refer(self, blocks: Sequence[int]) -> None:
        """Refer to known blocks, as `match` returned them."""
        references, idle = self._references, self._idle
        for block in blocks:
            if not references[block]:
                del idle[block]
            references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Return blocks that hold nothing, referred to once; what idle ones held is forgotten.

        Raises ValueError, and changes nothing, if fewer are free.
        """
        if count > self.free:
            raise ValueError(f"{count} blocks are wanted and {self.free} are free")
        blocks, forgotten = [], []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, block_hash = self._idle.popitem(last=False)
                self._forget(block, block_hash)
                forgotten.append(block_hash)
            self._references[block] = 1
            blocks.append(block)
        if forgotten:
            self._events.publish(BlockRemoved(tuple(forgotten)))
        return blocks

    def store(self, blocks: Sequence[int], hashes: Sequence[bytes], parent: bytes | None) -> list[int]:
        """Make full blocks known by their hashes; return the blocks to refer to from now on instead.

        The caller refers to the blocks, and to the known block `parent` that comes before them. Where a hash is known
        already, the reference moves to the known block and the caller's own becomes blank.
        """
        if not self._caching:
            return list(blocks)
        kept, new = [], []
        for block, block_hash in zip(blocks, hashes, strict=True):
            if (twin := self._known.get(block_hash)) is None:
                self._known[block_hash] = block
                self._hashes[block], self._parents[block] = block_hash, parent
                new.append(block_hash)
                kept.append(block)
            else:
                self._publish_stored(new)
                new = []
                self.refer([twin])
                self.release([block])
                kept.append(twin)
            parent = block_hash
        self._publish_stored(new)
        return kept

    def release(self, blocks: Sequence[int]) -> None:
        """Take one reference back from each block; those nobody refers to become free, the last of them first."""
        references, hashes = self._references, self._hashes
        for block in reversed(blocks):
            references[block] -= 1
            if not references[block]:
                if (block_hash := hashes[block]) is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = block_hash

    def clear(self) -> bool:
        """Forget everything known, unless blocks are in use; return whether it was done."""
        if self.free < len(self._references):
            return False
        while self._idle:
            block, block_hash = self._idle.popitem()
            self._forget(block, block_hash)
            self._blank.append(block)
        self._events.publish(AllBlocksCleared())
        return True

    def tell_again(self) -> None:
        """Tell, by events, of all that is known: parents before those that follow them."""
        self._events.publish(AllBlocksCleared())
        told: set[bytes | None] = {None}
        for block in self._known.values():
            new: list[bytes] = []
            at: int | None = block
            while at is not None and (block_hash := self._hashes[at]) not in told and block_hash is not None:
                new.append(block_hash)
                told.add(block_hash)
                parent = self._parents[at]
                at = None if parent is None else self._known[parent]
            self._publish_stored(new[::-1])

    def check_integrity(self) -> None:
        """Raise AssertionError unless each block is in exactly one state and what is known is a tree."""
        if any(count < 0 for count in self._references):
            raise AssertionError("a block was released more often than it was referred to")
        free = [*self._blank, *self._idle]
        if len(set(free)) != len(free) or self.in_use.symmetric_difference(free) != set(range(len(self._references))):
            raise AssertionError("a block is both free and in use, or neither, or free twice")
        if {h: block for block, h in enumerate(self._hashes) if h is not None} != self._known:
            raise AssertionError("a block is not known by its own hash")
        if any(self._hashes[block] is not None for block in self._blank):
            raise AssertionError("a blank block has a hash")
        if any(self._hashes[block] != block_hash for block, block_hash in self._idle.items()):
            raise AssertionError("an idle block has another hash, or none")
        for block in self._known.values():
            parent = self._parents[block]
            if parent is None:
                continue
            if parent not in self._known:
                raise AssertionError("a known block's parent is not known")
            if self._references[block] > self._references[self._known[parent]]:
                raise AssertionError("somebody refers to a block and not to its parent")

    def _forget(self, block: int, block_hash: bytes) -> None:
        del self._known[block_hash]
        self._hashes[block] = self._parents[block] = None

    def _publish_stored(self, hashes: list[bytes]) -> None:
        if hashes:
            parent = self._parents[self._known[hashes[0]]]
            count = len(hashes) * self._block_size
            self._events.publish(BlockStored(tuple(hashes), parent, count, self._block_size))
