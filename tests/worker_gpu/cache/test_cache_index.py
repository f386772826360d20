"""The index of a KV cache, against the truth of an engine that may miss telling of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tasks.prompts.radix import Tier
from tasks.queueing.pull import Held
from tests.worker_gpu.cache.told_engine import BLOCK_SIZE, ToldEngine, Word, blocks_of, tokens_of
from worker_gpu.cache import CacheIndex, index
from worker_gpu.engines.kv_events import CPU, DISK, GPU

WORDS = st.text("ab", min_size=1, max_size=13)
MEDIA = st.sampled_from((GPU, GPU, CPU, DISK))
TTL_S = 100.0


class Clock:
    """Says what time it is."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def register(index: CacheIndex, word: Word, segments: int = 2) -> None:
    """Register a word as a profile, and its beginnings of two, five, eight … letters as its segments."""
    ends = range(2, len(word), 3)[:segments]
    index.register(f"whole {word}", tuple((f"link {word[:end]}", end) for end in ends), len(word), tokens_of(word), "")


def tokens(depths: tuple[int, int, int], word: Word) -> Held:
    """Return the tokens of so many blocks of a word, all of its tokens if those are all."""
    whole = len(word) // BLOCK_SIZE
    gpu, ram, disk = (len(word) if 0 < whole == depth else depth * BLOCK_SIZE for depth in depths)
    return gpu, ram, disk


class Indexing(RuleBasedStateMachine):
    """Blocks come and go in any order; with `misses`, the engine fails to tell of some of it."""

    misses = False

    @initialize()
    def begin(self) -> None:
        self.engine = ToldEngine()
        self.index = CacheIndex(self.engine.as_engine(), TTL_S, Clock())
        self.words: set[Word] = set()
        self.mirror: dict[str, Held] = {}
        self.calls = 0
        self.index.when_changed(self.called)

    def called(self) -> None:
        self.calls += 1

    @rule(word=WORDS)
    def register(self, word: Word) -> None:
        register(self.index, word)
        self.words |= {word, *(word[:end] for end in (2, 5) if end < len(word))}

    @rule(word=WORDS, medium=MEDIA, first=st.integers(0, 6))
    def store(self, word: Word, medium: str, first: int) -> None:
        if blocks := blocks_of(word)[first:]:
            self.engine.store(blocks, medium)

    @precondition(lambda self: any(self.engine.held.values()))
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        held = [(block, medium) for medium, blocks in self.engine.held.items() for block in blocks]
        self.engine.remove(*data.draw(st.sampled_from(sorted(held))))

    @rule()
    def clear(self) -> None:
        self.engine.clear()

    @precondition(lambda self: self.misses)
    @rule(word=WORDS, medium=MEDIA, data=st.data())
    def miss(self, word: Word, medium: str, data: Any) -> None:
        self.engine.tells = False
        if any(self.engine.held.values()) and data.draw(st.booleans()):
            self.remove(data)
        else:
            self.store(word, medium, 0)
        self.engine.tells = True
        # Until then, nobody can know.
        self.engine.store([b"another"])

    @precondition(lambda self: self.engine.told_again)
    @rule(word=WORDS)
    def find(self, word: Word) -> None:
        self.engine.hit(word)

    @rule()
    def take(self) -> None:
        """Follow the changes; together they are everything. Without a call there are none."""
        called, self.calls = self.calls, 0
        changes = self.index.changes()
        assert called or not changes
        self.mirror |= changes
        self.mirror = {name: held for name, held in self.mirror.items() if any(held)}
        assert self.mirror == self.index.everything()
        assert self.index.changes() == {}

    @invariant()
    def is_right(self) -> None:
        known = {block for word in self.words for block in blocks_of(word)}
        on_gpu = {word: self.engine.leading(word)[0] for word in self.words}
        reached = {block for word, depth in on_gpu.items() for block in blocks_of(word)[:depth]}
        for word in self.words:
            right = tokens(self.engine.leading(word), word)
            for name in (f"whole {word}", f"link {word}"):
                held = self.index.cached(name)
                if self.engine.told_again:
                    assert all(found <= true for found, true in zip(held, right, strict=True))
                else:
                    assert held in (right, (0, 0, 0))
                    assert held == right or name not in self.index._links
        facts = self.index.facts
        assert self.index.blocks.losses == self.engine.told_again
        assert facts.known_tokens + facts.free_tokens == facts.capacity_tokens
        if not self.engine.told_again:
            assert facts.known_tokens == len(reached) * BLOCK_SIZE
            assert self.index.blocks.count(Tier.GPU) == len(self.engine.held[GPU])
        assert len(known) == len(self.index._tree)
        self.index._tree.check_integrity()


class Missing(Indexing):
    """Some events are missed: the index then knows less than there is, and never more."""

    misses = True


Indexing.TestCase.settings = Missing.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
TestIndexing = Indexing.TestCase
TestMissing = Missing.TestCase


@pytest.fixture
def engine() -> ToldEngine:
    """Return an engine whose cache is empty."""
    return ToldEngine()


@pytest.fixture
def clock() -> Clock:
    """Return a clock at 0."""
    return Clock()


@pytest.fixture
def cache(engine: ToldEngine, clock: Clock) -> CacheIndex:
    """Return an index of the engine's cache."""
    return CacheIndex(engine.as_engine(), TTL_S, clock)


def test_a_copy_keeps_a_block(engine: ToldEngine, cache: CacheIndex) -> None:
    """VLLM tells of each copy: the block is there until the last one is gone."""
    register(cache, "abcd")
    engine.store(blocks_of("abcd"))
    engine.store(blocks_of("abcd")[1:])
    engine.remove(b"abcd")
    assert cache.cached("whole abcd") == (4, 4, 4)
    engine.remove(b"abcd")
    assert cache.cached("whole abcd") == (2, 2, 2)


def test_after_a_loss_copies_do_not_count(engine: ToldEngine, cache: CacheIndex) -> None:
    """What a prompt finds may be told again and again: it is gone with the first copy that goes, or it might be never."""
    register(cache, "abcd")
    engine.events.skip()
    engine.store(blocks_of("abcd"))
    assert engine.told_again == 1
    engine.hit("abcd")
    engine.hit("abcd")
    assert cache.cached("whole abcd") == (4, 4, 4)
    engine.remove(b"abcd")
    assert cache.cached("whole abcd") == (2, 2, 2)


def test_tiers_are_used_in_turn(engine: ToldEngine, cache: CacheIndex) -> None:
    """After the first block that the GPU lacks, all must come from a slower tier: what the GPU has there is not used."""
    register(cache, "aabbccdd", 0)
    engine.store([b"aa", b"aabbcc"], GPU)
    engine.store([b"aabb", b"aabbccdd"], CPU)
    assert cache.cached("whole aabbccdd") == (2, 4, 4)
    engine.store([b"aabbcc"], DISK)
    assert cache.cached("whole aabbccdd") == (2, 4, 8)


def test_all_full_blocks_are_all_tokens(engine: ToldEngine, cache: CacheIndex) -> None:
    """The token after the last full block is computed anew wherever the request runs."""
    register(cache, "abcde")
    engine.store(blocks_of("abcde")[:1])
    assert cache.cached("whole abcde") == (2, 2, 2)
    engine.store(blocks_of("abcde")[1:])
    assert cache.cached("whole abcde") == (5, 5, 5)


def test_what_was_there_before_is_found(engine: ToldEngine, cache: CacheIndex) -> None:
    """A profile that begins as another does has that beginning at once; so has one whose blocks are on disk."""
    called: list[bool] = []
    cache.when_changed(lambda: called.append(True))
    engine.store(blocks_of("abcdef"), DISK)
    assert not called
    register(cache, "abcdxx")
    assert called
    assert cache.cached("whole abcdxx") == (0, 0, 4)
    assert cache.changes() == {"link ab": (0, 0, 2), "link abcdx": (0, 0, 5), "whole abcdxx": (0, 0, 4)}


def test_a_short_profile_is_never_cached(engine: ToldEngine, cache: CacheIndex) -> None:
    """It has no full block. That is no error."""
    register(cache, "a")
    engine.store([b"a"])
    assert cache.cached("whole a") == cache.cached("unknown") == (0, 0, 0)
    assert len(cache._links) == 0


def test_what_is_neither_used_nor_held_is_forgotten(engine: ToldEngine, cache: CacheIndex, clock: Clock) -> None:
    """What is held is known for as long as it is; the engine says when it goes."""
    for word in ("aaaa", "bbbb", "cccc"):
        register(cache, word, 0)
        engine.store(blocks_of(word))
    engine.remove(b"bbbb")
    cache.changes()
    clock.now = TTL_S / 2
    for block in (b"bb", b"cccc", b"cc"):
        engine.remove(block)
    register(cache, "cccc", 0)
    assert cache.changes() == {"whole bbbb": (0, 0, 0), "whole cccc": (0, 0, 0)}
    clock.now = TTL_S
    register(cache, "cccc", 0)
    clock.now = TTL_S * 1.49
    assert cache.changes() == {}
    assert len(cache._links) == 3
    clock.now = TTL_S * 1.51
    assert cache.changes() == {}
    assert set(cache._links) == {"whole aaaa", "whole cccc"}
    register(cache, "bbbb", 0)
    assert len(cache._links) == 3


def test_profiles_beyond_the_bound_are_told_as_gone(
    engine: ToldEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one used least recently goes first; when it is used again, it is known again, and what of it is cached."""
    monkeypatch.setattr(index, "MAX_KEYS", 4)
    cache = CacheIndex(engine.as_engine(), TTL_S, clock)
    for word in ("aaaa", "bbbb", "cccc"):
        engine.store(blocks_of(word))
    register(cache, "aaaa", 0)
    register(cache, "bbbb", 0)
    assert set(cache.changes()) == {"whole aaaa", "whole bbbb"}
    clock.now = TTL_S / 10
    register(cache, "aaaa", 0)
    register(cache, "cccc", 0)
    register(cache, "dddddddddddd", 0)
    assert cache.changes() == {"whole bbbb": (0, 0, 0), "whole cccc": (4, 4, 4)}
    register(cache, "bbbb", 0)
    assert cache.changes() == {"whole aaaa": (0, 0, 0), "whole bbbb": (4, 4, 4)}
    # One that goes and comes back between two reports is not gone.
    register(cache, "aaaa", 0)
    register(cache, "cccc", 0)
    assert cache.changes() == {"whole bbbb": (0, 0, 0), "whole aaaa": (4, 4, 4), "whole cccc": (4, 4, 4)}


def test_what_is_held_goes_in_the_order_of_use(
    engine: ToldEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is seen again and again, as long as it is held."""
    monkeypatch.setattr(index, "MAX_KEYS", 4)
    cache = CacheIndex(engine.as_engine(), TTL_S, clock)
    for word in ("aaaa", "bbbb", "cccc"):
        engine.store(blocks_of(word))
    register(cache, "aaaa", 0)
    register(cache, "bbbb", 0)
    clock.now = TTL_S / 2
    register(cache, "aaaa", 0)
    clock.now = TTL_S * 1.1
    cache.changes()
    register(cache, "cccc", 0)
    assert set(cache._links) == {"whole aaaa", "whole cccc"}


def test_of_a_large_disk_the_last_is_known(
    engine: ToldEngine, cache: CacheIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were told of first are forgotten, and with them what comes after them."""
    monkeypatch.setattr("worker_gpu.cache.blocks.MAX_BLOCKS", 3)
    register(cache, "aaaa", 0)
    register(cache, "bbbb", 0)
    engine.store(blocks_of("aaaa"), DISK)
    engine.store(blocks_of("bbbb"), DISK)
    assert cache.cached("whole aaaa") == (0, 0, 0)
    assert cache.cached("whole bbbb") == (0, 0, 4)


def test_hits_are_counted(cache: CacheIndex) -> None:
    """Tokens of prompts, and those of them that were cached."""
    cache.count(100, 0)
    cache.count(100, 96)
    assert (cache.facts.queried_tokens, cache.facts.hit_tokens) == (200, 96)
