"""A radix tree over chains of hashes: which prefixes there are, which worker holds how much of them, on which tier.

    tree = RadixTree(max_keys=100_000, ttl_s=3600)
    tree.insert(path, value, now)           # The prefix `path` is known; `value` (a static_profile_hash) ends there.
    tree.hold(path, worker, (2, 2, 3), now) # Of `path` the worker holds 2 keys on the GPU, 3 down to its disk.
    tree.evict(path, worker, 1, Tier.RAM)   # All but its first key is on disk now, at best.
    tree.match(path)                        # How much of a path some worker holds; with `worker`, how much that one.
    tree.holders(path)                      # The same for each worker that holds any of it.
    tree.drop(worker); tree.expire(now)     # A worker is gone; what was not heard of for the TTL is forgotten.
    tree.find(key)                          # Where a key is: the values there and after it are those that need it.
    tree.root                               # To look at all nodes, see Node.

A path is a sequence of hashes each of which includes the one before it: block hashes of a KV cache in a worker, links
of profiles' hash chains in the gateway. A key therefore stands for all that comes before it, and occurs at one place.
A node is a run of keys (path compression): nodes begin where paths part, and end where a value is. So the work of
`insert`, `hold` and `match` is linear in the path, whatever the size of the tree; `evict` also visits what is lost.

What a worker holds is closed under prefixes, on each tier: a key is of no use without those before it, so whoever loses
one loses all after it. Tiers are cumulative as well, "here or on a faster one": depths are (gpu, ram, disk) with
gpu <= ram <= disk, counted in keys.

It is bounded: beyond `max_keys`, the leaf whose path was used least recently goes, as SGLang's does. Every use of a path
is a use of all nodes on it, so no node was used later than its parent, and the oldest node of all is a leaf. Nodes are
not joined again when what parted them is gone; they would have been seen at different times.

Times are seconds on any clock that never goes back. Nothing here is safe for several threads.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile
from operator import eq
from typing import Generic

from tasks.prompts.radix_node import NOTHING, Depths, Holding, K, Node, Tier, clipped

__all__ = ["NOTHING", "Depths", "Holding", "Node", "RadixTree", "Tier"]


class RadixTree(Generic[K]):
    """See the module. `ttl_s` is how long what nobody speaks of is kept."""

    def __init__(self, max_keys: int, ttl_s: float) -> None:
        self._max_keys = max_keys
        self._ttl_s = ttl_s
        self.root: Node[K] = Node((), None, 0, 0.0)
        self._node_of: dict[K, Node[K]] = {}
        #: All nodes but the root, the least recently used first, and each before its parent.
        self._order: OrderedDict[Node[K], None] = OrderedDict()
        self._held: dict[str, Depths] = {}

    def __len__(self) -> int:
        """Return how many keys there are."""
        return len(self._node_of)

    def insert(self, path: Sequence[K], value: str, now: float) -> set[str]:
        """Make a path known, with a value at its end, and use it. Return the values that were forgotten for it.

        Raises ValueError for a path that is empty, longer than the tree may be, or that has a key after another than
        before.
        """
        if not path or len(path) > self._max_keys:
            raise ValueError(f"a path of {len(path)} keys, where 1 to {self._max_keys} are possible")
        nodes, depth = self._shared(path)
        last = nodes[-1] if nodes else self.root
        if any(key in self._node_of for key in path[depth:]):
            raise ValueError("a key comes after another than before")
        if depth < last.depth + len(last.keys):
            nodes[-1] = last = last.split(depth - last.depth)
            self._node_of.update(dict.fromkeys(last.keys, last))
        if depth < len(path):
            leaf = Node(tuple(path[depth:]), last, depth, now)
            last.children[leaf.keys[0]] = leaf
            self._node_of.update(dict.fromkeys(leaf.keys, leaf))
            nodes.append(leaf)
        nodes[-1].values.add(value)
        self._use(nodes, now)
        forgotten: set[str] = set()
        while len(self) > self._max_keys:
            forgotten |= self._forget_oldest()
        return forgotten

    def hold(self, path: Sequence[K], worker: str, depths: Depths, now: float) -> None:
        """Note how many of a path's first keys a worker holds, no more and no fewer, and use the path.

        Raises KeyError if the path was not inserted, or has been forgotten.
        """
        nodes = self._nodes(path)
        for node in nodes:
            self._restate(node, worker, clipped(depths, node.depth, node.depth + len(node.keys)), now)
        self._use(nodes, now)

    def evict(self, path: Sequence[K], worker: str, depth: int, tier: Tier = Tier.DISK) -> None:
        """Note that after a path's first `depth` keys a worker holds nothing on `tier`, or on a faster one.

        That ends whatever else it holds after the first key lost. Raises KeyError as `hold` does.
        """
        for node in self._nodes(path):
            if (holding := node.held.get(worker)) is not None:
                left = max(depth - node.depth, 0)
                kept = [min(held, left) if at <= tier else held for at, held in enumerate(holding.depths)]
                self._restate(node, worker, (kept[0], kept[1], kept[2]), holding.seen)

    def drop(self, worker: str) -> None:
        """Forget all that a worker holds."""
        for node in self._order:
            self._note(node, worker, NOTHING, 0.0)

    def expire(self, now: float) -> set[str]:
        """Forget what was last said or used longer ago than the TTL. Return the values that were forgotten."""
        limit, forgotten = now - self._ttl_s, set()
        while self._order and (oldest := next(iter(self._order))).used < limit:
            forgotten |= oldest.values
            self._forget_oldest()
        for node in self._order:
            for worker in [worker for worker, holding in node.held.items() if holding.seen < limit]:
                self._note(node, worker, NOTHING, 0.0)
        return forgotten

    def match(self, path: Sequence[K], worker: str | None = None) -> Depths:
        """Return how many of a path's first keys a worker holds; without `worker`, the most that any does, by tier."""
        found = self.holders(path, worker).values()
        gpu, ram, disk = (max((depths[tier] for depths in found), default=0) for tier in Tier)
        return gpu, ram, disk

    def holders(self, path: Sequence[K], worker: str | None = None) -> dict[str, Depths]:
        """Return how many of a path's first keys each worker holds, or `worker` alone, if it holds any."""
        found: dict[str, Depths] = {}
        nodes, shared = self._shared(path)
        for node in nodes:
            size = min(len(node.keys), shared - node.depth)
            for holder, holding in node.held.items():
                if worker is None or holder == worker:
                    gpu, ram, disk = (min(held, size) for held in holding.depths)
                    before = found.get(holder, NOTHING)
                    found[holder] = before[0] + gpu, before[1] + ram, before[2] + disk
        return found

    def find(self, key: K) -> Node[K] | None:
        """Return the node that has a key; the values at it and after it are those of the paths with this key."""
        return self._node_of.get(key)

    def held(self, worker: str) -> Depths:
        """Return how many keys a worker holds, on each tier or a faster one, those of several paths counted once."""
        return self._held.get(worker, NOTHING)

    def check_integrity(self) -> None:
        """Raise AssertionError unless all that the module says of nodes is so."""
        nodes = list(self.root.walk())[1:]
        if set(nodes) != set(self._order) or self._node_of != {key: node for node in nodes for key in node.keys}:
            raise AssertionError("a node or a key is not where it should be found")
        order = {node: place for place, node in enumerate(self._order)}
        totals: dict[str, list[int]] = {}
        for node in nodes:
            node.check_integrity()
            if order[node] > order.get(node.parent or node, len(order)):
                raise AssertionError("a node would be forgotten after its parent")
            for worker, holding in node.held.items():
                before = totals.get(worker, [0, 0, 0])
                totals[worker] = [held + more for held, more in zip(before, holding.depths, strict=True)]
        if {worker: tuple(total) for worker, total in totals.items()} != self._held:
            raise AssertionError("the sums are wrong")

    def _shared(self, path: Sequence[K]) -> tuple[list[Node[K]], int]:
        """Return the nodes that a path leads through, the last perhaps in part, and how many of its keys they share."""
        nodes: list[Node[K]] = []
        node, depth = self.root, 0
        while depth < len(path) and (child := node.children.get(path[depth])) is not None:
            nodes.append(node := child)
            here = tuple(path[depth : depth + len(node.keys)])
            if here != node.keys:
                return nodes, depth + sum(1 for _ in takewhile(bool, map(eq, here, node.keys)))
            depth += len(here)
        return nodes, depth

    def _nodes(self, path: Sequence[K]) -> list[Node[K]]:
        """Return the nodes of a path that was inserted."""
        nodes, depth = self._shared(path)
        if not nodes or depth != len(path) or depth != nodes[-1].depth + len(nodes[-1].keys):
            raise KeyError(path[-1] if path else None)
        return nodes

    def _use(self, nodes: list[Node[K]], now: float) -> None:
        for node in reversed(nodes):
            node.used = now
            self._order[node] = None
            self._order.move_to_end(node)

    def _note(self, node: Node[K], worker: str, depths: Depths, seen: float) -> None:
        if worker in node.held or depths != NOTHING:
            more = node.note(worker, depths, seen)
            gpu, ram, disk = (held + more[tier] for tier, held in enumerate(self.held(worker)))
            if disk:
                self._held[worker] = (gpu, ram, disk)
            else:
                self._held.pop(worker, None)

    def _restate(self, node: Node[K], worker: str, depths: Depths, seen: float) -> None:
        """Note what a worker holds of a node. If it no longer holds all of it, it holds nothing after it."""
        stack = [(node, depths, seen)]
        while stack:
            node, depths, seen = stack.pop()
            size, before = len(node.keys), node.held[worker].depths if worker in node.held else NOTHING
            self._note(node, worker, depths, seen)
            lost = [before[tier] == size > depths[tier] for tier in Tier]
            if any(lost):
                for child in node.children.values():
                    if (holding := child.held.get(worker)) is not None:
                        gpu, ram, disk = (
                            0 if gone else depth for gone, depth in zip(lost, holding.depths, strict=True)
                        )
                        stack.append((child, (gpu, ram, disk), holding.seen))

    def _forget_oldest(self) -> set[str]:
        """Forget the leaf that was used least recently, and nodes that only led to it. Return its values."""
        leaf = next(iter(self._order))
        node = leaf
        while (parent := node.parent) is not None:
            for worker in list(node.held):
                self._note(node, worker, NOTHING, 0.0)
            for key in node.keys:
                del self._node_of[key]
            del self._order[node]
            del parent.children[node.keys[0]]
            if parent.children or parent.values:
                break
            node = parent
        return leaf.values
