"""The radix tree against a naive model: plain dicts of keys, in which every question is answered by looking at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tasks.prompts.radix import NOTHING, Depths, RadixTree, Tier

TTL_S = 20.0
#: Keys are the beginnings of words: as with hashes of a chain, each stands for all before it.
WORDS = st.text("ab", min_size=1, max_size=7)
WORKERS = st.sampled_from(("one", "two"))
DEPTHS = st.tuples(*[st.integers(0, 8)] * 3).map(sorted).map(tuple)
SECONDS = st.sampled_from((0.0, 1.0, 7.0))


def path_of(word: str) -> list[str]:
    """Return the path of a word: "abc" is a, ab, abc."""
    return [word[:end] for end in range(1, len(word) + 1)]


class Naive:
    """What the tree should be: for each key when it was used, which values end there, who holds it where."""

    def __init__(self, max_keys: int) -> None:
        self.max_keys = max_keys
        self.used: dict[str, float] = {}
        #: The order of use: of two keys used at once, the longer counts as the older.
        self.turn: dict[str, tuple[int, int]] = {}
        self.values: dict[str, set[str]] = {}
        self.held: dict[str, list[set[str]]] = {}
        self.seen: dict[tuple[str, str], float] = {}
        self.uses = 0

    def use(self, word: str, now: float) -> None:
        self.uses += 1
        for key in path_of(word):
            self.used[key], self.turn[key] = now, (self.uses, -len(key))

    def insert(self, word: str, value: str, now: float) -> set[str]:
        self.use(word, now)
        self.values.setdefault(word, set()).add(value)
        gone: set[str] = set()
        while len(self.used) > self.max_keys:
            gone |= self.forget(min((key for key in self.used if not self.after(key)), key=self.turn.__getitem__))
        return gone

    def after(self, key: str) -> list[str]:
        return [other for other in self.used if other != key and other.startswith(key)]

    def forget(self, leaf: str) -> set[str]:
        """Forget a leaf, and all before it that has no value and leads nowhere else."""
        gone = self.values.get(leaf, set())
        while leaf:
            self.lose(leaf)
            for known in (self.used, self.turn, self.values):
                known.pop(leaf, None)
            leaf = leaf[:-1]
            if leaf in self.values or self.after(leaf):
                break
        return gone

    def lose(self, key: str, worker: str | None = None, tier: Tier = Tier.DISK) -> None:
        """Let workers, or one, lose a key and all after it on the tier and the faster ones."""
        for each in self.held if worker is None else [worker] if worker in self.held else []:
            for held in self.held[each][: tier + 1]:
                held -= {other for other in held if other.startswith(key)}

    def hold(self, word: str, worker: str, depths: Depths, now: float) -> None:
        self.use(word, now)
        tiers = self.held.setdefault(worker, [set(), set(), set()])
        for place, key in enumerate(path_of(word)):
            for tier in Tier:
                if place < depths[tier]:
                    tiers[tier].add(key)
                    self.seen[worker, key] = now
                else:
                    self.lose(key, worker, tier)

    def expire(self, now: float) -> set[str]:
        limit, gone = now - TTL_S, set()
        for (worker, key), seen in self.seen.items():
            if seen < limit:
                self.lose(key, worker)
        for key in [key for key, used in self.used.items() if used < limit]:
            self.lose(key)
            gone |= self.values.pop(key, set())
            del self.used[key], self.turn[key]
        return gone

    def depths(self, word: str, worker: str) -> Depths:
        gpu, ram, disk = (len(held & set(path_of(word))) for held in self.held.get(worker, [set()] * 3))
        return gpu, ram, disk


class Trees(RuleBasedStateMachine):
    """Does the same with both, and compares them whole after every step."""

    @initialize(max_keys=st.integers(7, 30))
    def begin(self, max_keys: int) -> None:
        self.tree: RadixTree[str] = RadixTree(max_keys, TTL_S)
        self.naive = Naive(max_keys)
        self.now = 0.0
        self.inserted: set[str] = set()

    @rule(word=WORDS, value=st.sampled_from("xyz"), later=SECONDS)
    def insert(self, word: str, value: str, later: float) -> None:
        self.now += later
        self.inserted.add(word)
        assert self.tree.insert(path_of(word), value, self.now) == self.naive.insert(word, value, self.now)

    def a_known(self, data: Any) -> str:
        return str(data.draw(st.sampled_from(sorted(self.naive.values))))

    @precondition(lambda self: self.naive.values)
    @rule(data=st.data(), worker=WORKERS, depths=DEPTHS, later=SECONDS)
    def hold(self, data: Any, worker: str, depths: Depths, later: float) -> None:
        self.now += later
        word = self.a_known(data)
        self.tree.hold(path_of(word), worker, depths, self.now)
        self.naive.hold(word, worker, depths, self.now)

    @precondition(lambda self: self.naive.values)
    @rule(data=st.data(), worker=WORKERS, depth=st.integers(0, 7), tier=st.sampled_from(Tier))
    def evict(self, data: Any, worker: str, depth: int, tier: Tier) -> None:
        word = self.a_known(data)
        self.tree.evict(path_of(word), worker, depth, tier)
        for key in path_of(word)[depth:]:
            self.naive.lose(key, worker, tier)

    @rule(worker=WORKERS)
    def drop(self, worker: str) -> None:
        self.tree.drop(worker)
        self.naive.held.pop(worker, None)

    @rule(later=SECONDS)
    def expire(self, later: float) -> None:
        self.now += later
        assert self.tree.expire(self.now) == self.naive.expire(self.now)

    @rule(word=WORDS)
    def ask(self, word: str) -> None:
        path = path_of(word)
        holders = {worker: self.naive.depths(word, worker) for worker in ("one", "two")}
        assert self.tree.holders(path) == {worker: depths for worker, depths in holders.items() if depths != NOTHING}
        assert self.tree.match(path) == tuple(max(tier) for tier in zip(*holders.values(), strict=True))
        assert self.tree.match(path, "one") == holders["one"]
        under = [values for key, values in self.naive.values.items() if key.startswith(word)]
        found = self.tree.find(word)
        values = [] if found is None else [value for node in found.walk() for value in node.values]
        assert sorted(values) == sorted(value for values in under for value in values)

    @invariant()
    def same(self) -> None:
        """Compare all keys and all that is held."""
        self.tree.check_integrity()
        nodes = list(self.tree.root.walk())
        assert {key: node.used for node in nodes for key in node.keys} == self.naive.used
        assert {node.keys[-1]: node.values for node in nodes if node.values} == self.naive.values
        for worker in ("one", "two"):
            held = self.naive.held.get(worker, [set(), set(), set()])
            assert self.tree.held(worker) == tuple(map(len, held))
            for tier in Tier:
                kept = [node.keys[: node.held[worker].depths[tier]] for node in nodes if worker in node.held]
                assert {key for keys in kept for key in keys} == held[tier]


Trees.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestTrees = Trees.TestCase


def test_a_path_that_cannot_be_is_refused() -> None:
    """An empty one, one longer than the whole tree may be, and one that puts a known key elsewhere; nothing changes."""
    tree: RadixTree[str] = RadixTree(3, TTL_S)
    tree.insert("abc", "x", 0.0)
    for path in ("", "abcd", "b", "xc"):
        with pytest.raises(ValueError, match=r"possible|another"):
            tree.insert(path, "y", 1.0)
    tree.check_integrity()
    assert tree.find("c") is tree.find("b") is not None
    assert len(tree) == 3


def test_what_was_not_inserted_cannot_be_held() -> None:
    """Nor evicted: a path that ends within a node is none that somebody has named."""
    tree: RadixTree[str] = RadixTree(9, TTL_S)
    tree.insert("abc", "x", 0.0)
    for path in ("", "ab", "abcd", "z"):
        with pytest.raises(KeyError):
            tree.hold(path, "one", (1, 1, 1), 0.0)
        with pytest.raises(KeyError):
            tree.evict(path, "one", 0)


def test_a_shared_beginning_is_kept_once() -> None:
    """A thousand profiles on one base have one node for it, and what a worker holds of it is counted once."""
    tree: RadixTree[str] = RadixTree(100_000, TTL_S)
    base = [f"base-{place}" for place in range(50)]
    for number in range(1000):
        path = [*base, f"{number}-a", f"{number}-b"]
        tree.insert(path, str(number), 0.0)
        tree.hold(path, "one", (51, 52, 52), 0.0)
    assert len(tree) == 50 + 2000
    assert len(list(tree.root.walk())) == 1002
    assert tree.held("one") == (1050, 2050, 2050)
    tree.evict(path, "one", 49, Tier.GPU)
    assert tree.held("one") == (49, 2050, 2050)
