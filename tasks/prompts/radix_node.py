"""What a radix tree (see tasks/prompts/radix.py) is made of."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
Depths = tuple[int, int, int]
NOTHING: Depths = (0, 0, 0)


class Tier(IntEnum):
    """Where keys and values lie, the fastest first; an index into Depths."""

    GPU = 0
    RAM = 1
    DISK = 2


@dataclass(frozen=True, slots=True)
class Holding:
    """How many of a node's first keys a worker holds, by tier or a faster one, and when that was last said."""

    depths: Depths
    seen: float


@dataclass(slots=True, eq=False)
class Node(Generic[K]):
    """A run of keys, to be read only. `depth` counts the keys before the run, `children` are found by their first key.

    `values` end with the run's last key; `used` is when a path through here was last inserted or held. The root has no
    keys and no parent.
    """

    keys: tuple[K, ...]
    parent: Node[K] | None
    depth: int
    used: float
    children: dict[K, Node[K]] = field(default_factory=dict)
    values: set[str] = field(default_factory=set)
    held: dict[str, Holding] = field(default_factory=dict)

    def walk(self) -> Iterator[Node[K]]:
        """Return this node and all after it, each before its children."""
        stack = [self]
        while stack:
            yield (node := stack.pop())
            stack.extend(reversed(node.children.values()))

    def note(self, worker: str, depths: Depths, seen: float) -> list[int]:
        """Note what a worker holds of this node; return by how much that is more than before, on each tier."""
        before = self.held.pop(worker, None)
        if depths != NOTHING:
            self.held[worker] = Holding(depths, seen)
        return [depths[tier] - (before.depths[tier] if before is not None else 0) for tier in Tier]

    def split(self, at: int) -> Node[K]:
        """Give the first `at` keys a node of their own, between this one and its parent; return that."""
        keys, parent = self.keys[:at], self.parent
        upper = Node(keys, parent, self.depth, self.used, {self.keys[at]: self})
        if parent is not None:
            parent.children[keys[0]] = upper
        self.keys, self.parent, self.depth = self.keys[at:], upper, self.depth + at
        for worker, (depths, seen) in [(worker, (each.depths, each.seen)) for worker, each in self.held.items()]:
            upper.note(worker, clipped(depths, 0, at), seen)
            self.note(worker, clipped(depths, at, at + len(self.keys)), seen)
        return upper

    def check_integrity(self) -> None:
        """Raise AssertionError unless the node fits its parent, and so does what is held of both."""
        parent = self.parent
        if parent is None or parent.children.get(self.keys[0]) is not self:
            raise AssertionError("a node is not its parent's child")
        if self.depth != parent.depth + len(parent.keys) or not (self.children or self.values):
            raise AssertionError("a node has the wrong depth, or a leaf has no value")
        if parent.keys and parent.used < self.used:
            raise AssertionError("a node was used later than its parent")
        for worker, holding in self.held.items():
            gpu, ram, disk = holding.depths
            if not 0 <= gpu <= ram <= disk <= len(self.keys):
                raise AssertionError("a faster tier holds more than it and the slower ones together")
            above = parent.held.get(worker, Holding(NOTHING, 0.0)).depths
            if parent.keys and any(holding.depths[tier] and above[tier] < len(parent.keys) for tier in Tier):
                raise AssertionError("a worker holds a key and not all before it")


def clipped(depths: Depths, start: int, end: int) -> Depths:
    """Return how many of the keys from `start` to `end` are held, where `depths` of all keys are."""
    gpu, ram, disk = (min(max(depth - start, 0), end - start) for depth in depths)
    return gpu, ram, disk
