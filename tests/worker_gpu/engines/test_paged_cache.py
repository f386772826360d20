"""The block pool against a naive model of it, and what its events tell against what it holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.worker_gpu.engines.kv_replay import KvReplay
from worker_gpu.engines.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEvents
from worker_gpu.engines.paged_cache import BlockPool

BLOCK_SIZE = 4
#: A chain of blocks is a word; the hash of each is the word up to it. Few letters, so that many chains share.
WORDS = st.text("ab", min_size=1, max_size=6).map(str.encode)


def hashes_of(word: bytes) -> list[bytes]:
    """Return the hashes of a chain."""
    return [word[:end] for end in range(1, len(word) + 1)]


@dataclass
class Holder:
    """A running sequence: its chain, its blocks, and how many of them it has stored."""

    word: bytes
    blocks: list[int]
    stored: int


class NaivePool:
    """The same pool without blocks: counts and plain lists."""

    def __init__(self, blank: int) -> None:
        self.blank = blank
        self.idle: list[bytes] = []  # The least recently used first.
        self.references: Counter[bytes] = Counter()

    @property
    def known(self) -> set[bytes]:
        return {*self.idle, *self.references}

    @property
    def free(self) -> int:
        return self.blank + len(self.idle)

    def refer(self, block_hash: bytes) -> None:
        if block_hash in self.idle:
            self.idle.remove(block_hash)
        self.references[block_hash] += 1

    def allocate(self, count: int) -> None:
        for _ in range(count):
            if self.blank:
                self.blank -= 1
            else:
                self.idle.pop(0)

    def release(self, holder: Holder) -> None:
        self.blank += len(holder.blocks) - holder.stored
        for block_hash in reversed(hashes_of(holder.word)[: holder.stored]):
            self.references[block_hash] -= 1
            if not self.references[block_hash]:
                del self.references[block_hash]
                self.idle.append(block_hash)


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, compute, share and go, in any order."""

    @initialize(num_blocks=st.integers(1, 12))
    def begin(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.replay = KvReplay()
        events = KvEvents()
        events.subscribe(self.replay.apply)
        self.pool = BlockPool(num_blocks, BLOCK_SIZE, events)
        self.naive = NaivePool(num_blocks)
        self.holders: list[Holder] = []

    @rule(word=WORDS)
    def admit(self, word: bytes) -> None:
        hashes = hashes_of(word)
        found = self.pool.match(hashes)
        expected = next((index for index, h in enumerate(hashes) if h not in self.naive.known), len(hashes))
        assert len(found) == expected
        missing = len(hashes) - len(found)
        idle = sum(block_hash in self.naive.idle for block_hash in hashes[: len(found)])
        assert self.pool.free_beside(found) == self.naive.free - idle
        if missing > self.pool.free_beside(found):
            return
        self.pool.refer(found)
        for block_hash in hashes[: len(found)]:
            self.naive.refer(block_hash)
        blocks = found + self.pool.allocate(missing)
        self.naive.allocate(missing)
        assert len(set(blocks)) == len(blocks)
        self.holders.append(Holder(word, blocks, len(found)))

    @precondition(lambda self: any(holder.stored < len(holder.blocks) for holder in self.holders))
    @rule(choice=st.integers(0, 11), count=st.integers(1, 6))
    def store(self, choice: int, count: int) -> None:
        unstored = [holder for holder in self.holders if holder.stored < len(holder.blocks)]
        holder = unstored[choice % len(unstored)]
        end = min(holder.stored + count, len(holder.blocks))
        new = slice(holder.stored, end)
        hashes = hashes_of(holder.word)
        for block_hash in hashes[new]:
            if block_hash in self.naive.known:
                self.naive.blank += 1
            self.naive.refer(block_hash)
        parent = hashes[new.start - 1] if new.start else None
        holder.blocks[new] = self.pool.store(holder.blocks[new], hashes[new], parent)
        holder.stored = end
        assert self.pool.match(hashes[:end]) == holder.blocks[:end]

    @precondition(lambda self: self.holders)
    @rule(choice=st.integers(0, 11))
    def release(self, choice: int) -> None:
        holder = self.holders.pop(choice % len(self.holders))
        self.naive.release(holder)
        self.pool.release(holder.blocks)

    @rule()
    def clear(self) -> None:
        assert self.pool.clear() == (not self.holders)
        if not self.holders:
            self.naive.blank, self.naive.idle = self.num_blocks, []

    @rule()
    def tell_again(self) -> None:
        before = dict(self.replay.content)
        self.pool.tell_again()
        assert self.replay.content == before

    @rule(more=st.integers(1, 3))
    def ask_for_too_much(self, more: int) -> None:
        with pytest.raises(ValueError, match="are wanted"):
            self.pool.allocate(self.pool.free + more)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free == self.naive.free
        assert self.pool.in_use == {block for holder in self.holders for block in holder.blocks}
        assert self.pool.known == self.naive.known == self.replay.content.keys()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def pool_of(num_blocks: int) -> tuple[BlockPool, KvReplay]:
    """Return a pool, and what its events tell."""
    events, replay = KvEvents(), KvReplay()
    events.subscribe(replay.apply)
    return BlockPool(num_blocks, BLOCK_SIZE, events), replay


def use(pool: BlockPool, word: bytes) -> list[int]:
    """Compute a whole chain; return its blocks, which stay in use."""
    hashes = hashes_of(word)
    found = pool.match(hashes)
    pool.refer(found)
    new = pool.allocate(len(hashes) - len(found))
    parent = hashes[len(found) - 1] if found else None
    return found + pool.store(new, hashes[len(found) :], parent)


def test_the_least_recently_used_chain_is_forgotten_first_from_its_end() -> None:
    """Of a chain, the beginning stays longest; what was used last stays whole."""
    pool, _ = pool_of(6)
    pool.release(use(pool, b"old"))
    pool.release(use(pool, b"new"))
    pool.release(use(pool, b"old"))
    pool.allocate(2)
    assert len(pool.match(hashes_of(b"old"))) == 3
    assert len(pool.match(hashes_of(b"new"))) == 1


def test_blocks_in_use_are_never_taken() -> None:
    """They are not even counted."""
    pool, _ = pool_of(4)
    use(pool, b"ab")
    pool.release(use(pool, b"abx"))
    assert pool.free == 2
    pool.allocate(2)
    assert pool.known == {b"a", b"ab"}


def test_events_tell_each_change_once() -> None:
    """A run of blocks is one event; blocks that were known already are in none."""
    pool, replay = pool_of(4)
    pool.release(use(pool, b"ab"))
    pool.release(use(pool, b"abc"))
    pool.allocate(2)
    assert pool.clear() is False
    assert replay.events == [
        BlockStored((b"a", b"ab"), None, 2 * BLOCK_SIZE, BLOCK_SIZE),
        BlockStored((b"abc",), b"ab", BLOCK_SIZE, BLOCK_SIZE),
        BlockRemoved((b"abc",)),
    ]


def test_clearing_forgets_everything_that_is_idle() -> None:
    """Afterwards all blocks are blank."""
    pool, replay = pool_of(3)
    pool.release(use(pool, b"abc"))
    assert pool.clear() is True
    assert not pool.known
    assert pool.free == 3
    assert replay.events[-1] == AllBlocksCleared()
    pool.check_integrity()


def test_a_pool_without_caching_knows_nothing() -> None:
    """Blocks that are stored become blank when released, and there are no events."""
    events, replay = KvEvents(), KvReplay()
    events.subscribe(replay.apply)
    pool = BlockPool(3, BLOCK_SIZE, events, caching=False)
    pool.release(use(pool, b"abc"))
    assert not pool.match(hashes_of(b"abc"))
    assert (pool.free, replay.events) == (3, [])
    pool.check_integrity()


def test_integrity_is_checked() -> None:
    """Releasing twice, releasing a parent alone, and forgetting a parent alone are found out."""
    pool = BlockPool(3, BLOCK_SIZE, KvEvents())
    blocks = use(pool, b"ab")
    pool.release(blocks[:1])
    with pytest.raises(AssertionError, match="not to its parent"):
        pool.check_integrity()
    pool.allocate(2)
    with pytest.raises(AssertionError, match="parent is not known"):
        pool.check_integrity()
    pool, _ = pool_of(3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.check_integrity()
