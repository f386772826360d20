"""Profiles as a tree: a segment that several share, and below it what goes on from there.

It is the radix tree over the profiles' links (tasks/prompts/radix.py): where paths part there is a segment, where one ends
there is a profile. A profile that others extend ends where they go on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway_app.kv_cache.fleet import Copies
from gateway_app.kv_cache.stored import Inner, Stored
from tasks.cache_hits import Hits
from tasks.prompts.chain import LINK_DIGITS
from tasks.prompts.radix import Node, RadixTree
from tasks.queueing.pull import Held

#: The fastest memory that all of a prefix is in; `part` if none holds all of it.
Tier = Literal["gpu", "ram", "disk", "part"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A segment that several profiles share, or, with `stored`, a profile: how many tokens it has, and who holds how much.

    `parent` is the link of the segment that it goes on from, `depth` how many there are. `kinds` are those of the segments
    that end here, after the parent's; a profile's own last one is not among them. `profiles` end here or below.
    """

    organization: str
    link: str
    parent: str | None
    depth: int
    tokens: int
    kinds: tuple[str, ...]
    profiles: int
    stored: Stored | None
    hits: Hits
    copies: Mapping[str, Held]


def tier(held: Held, tokens: int) -> Tier:
    """Return where all of a prefix is, of which so much is held on the GPU, there or in RAM, and there, in RAM or on disk."""
    gpu, ram, disk = (part >= tokens for part in held)
    return "gpu" if gpu else "ram" if ram else "disk" if disk else "part"


def entries(found: Sequence[Stored], copies: Copies, hits: Mapping[str, Hits]) -> list[Entry]:
    """Return the tree of some profiles of one organization, each entry before those below it."""
    tree: RadixTree[str] = RadixTree(sum(len(each.chain) + 1 for each in found), ttl_s=math.inf)
    for each in found:
        path = [*(inner.link for inner in each.chain), each.static_profile_hash[:LINK_DIGITS]]
        try:
            tree.insert(path, each.static_profile_hash, now=0.0)
        except ValueError:
            # Releases that found other ends of the same segments stored them; then it is shown by itself.
            tree.insert([each.static_profile_hash], each.static_profile_hash, now=0.0)
    inner = {segment.link: segment for each in found for segment in each.chain}
    named: dict[str, list[Stored]] = {}
    for each in found:
        named.setdefault(each.static_profile_hash, []).append(each)
    made = _Maker(found[0].organization if found else "", inner, named, copies, hits)
    return list(made.below(tree.root, None, 0))


@dataclass(frozen=True, slots=True)
class _Maker:
    organization: str
    inner: Mapping[str, Inner]
    named: Mapping[str, Sequence[Stored]]
    copies: Copies
    hits: Mapping[str, Hits]

    def below(self, node: Node[str], parent: str | None, depth: int) -> Iterator[Entry]:
        """Return the entries below a node, whose last key is `parent`."""
        for child in node.children.values():
            kinds = tuple(self.inner[key].kind for key in child.keys if key in self.inner)
            above, at = parent, depth
            if child.children:
                above, at = child.keys[-1], depth + 1
                count = sum(len(self.named[value]) for each in child.walk() for value in each.values)
                yield self._entry(above, parent, depth, self.inner[above].tokens, kinds, count, None)
                kinds = ()
            for each in (each for name in sorted(child.values) for each in self.named[name]):
                yield self._entry(each.static_profile_hash, above, at, each.tokens, kinds, 1, each)
            yield from self.below(child, above, at)

    def _entry(
        self,
        link: str,
        parent: str | None,
        depth: int,
        tokens: int,
        kinds: tuple[str, ...],
        profiles: int,
        stored: Stored | None,
    ) -> Entry:
        hits, copies = self.hits.get(link, Hits()), self.copies.get(link, {})
        return Entry(self.organization, link, parent, depth, tokens, kinds, profiles, stored, hits, copies)
