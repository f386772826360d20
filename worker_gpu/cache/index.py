"""The index of this worker's KV cache: how much of each profile, and of each beginning that profiles share, it holds.

    engine's events -> HeldBlocks: which blocks -> a radix tree of the profiles' blocks -> links, with tokens by tier

A profile is registered before its first request, with the token ids of its static part: they give its blocks, by the
engine's own hash function. A link is what the queue knows a prompt's beginning by: the profile's hash for all of it, and
those of the segments in it (`tasks.prompts.chain`). Each is a path of blocks, its full ones, in a radix tree, where profiles
share what they begin with. When a block comes or goes, the tree tells which links have it; how much of those is held is
looked up when somebody asks, however many events there were.

If all full blocks of a link are held, all its tokens count as cached: the few after its last full block are computed anew for
each request, wherever it runs.

The index is bounded: `MAX_KEYS` blocks of profiles, of which those used least recently go first, and profiles that were
neither used nor held for `ttl_s`. What the cache holds of them is then unknown, and is told as gone.

Everything happens on the engine's loop; `facts` alone may be asked for by any thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from tasks.job import Chain
from tasks.prompts.radix import NOTHING, Node, RadixTree
from tasks.queueing.pull import Held
from worker_gpu.cache.blocks import HeldBlocks
from worker_gpu.engines.base import Engine

#: Blocks of all registered profiles, shared ones counted once; about 250 bytes each.
MAX_KEYS: Final = 200_000
#: A profile's use is noted at most so often, as a share of the TTL.
_NOTED_SHARE = 0.01
_HERE = "here"


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What a worker says of its cache: sizes in tokens, and of all prompts since its start, their tokens and the cached ones.

    `known_tokens` are those of registered profiles on the GPU, what they share counted once; `free_tokens` is the rest of the
    cache, which holds what is no profile's, or nothing.
    """

    capacity_tokens: int
    known_tokens: int
    free_tokens: int
    queried_tokens: int
    hit_tokens: int


@dataclass(slots=True)
class _Link:
    """A registered link: its tokens, its full blocks, and what was last found and last told of it."""

    tokens: int
    path: Sequence[bytes]
    held: Held = NOTHING
    told: Held = NOTHING


class CacheIndex:
    """See the module. Make it before the engine starts; `clock` gives seconds and never goes back.

    `blocks` are all that the engine has told of, whoever's they are.
    """

    def __init__(self, engine: Engine, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._ttl_s = ttl_s
        self._clock = clock
        self._tree: RadixTree[bytes] = RadixTree(MAX_KEYS, ttl_s)
        self.blocks = HeldBlocks(self._touch, engine.tell_again)
        self._links: dict[str, _Link] = {}
        #: When each profile's use was last noted.
        self._used: dict[str, float] = {}
        self._touched: set[Node[bytes]] = set()
        self._changed: set[str] = set()
        self._gone: set[str] = set()
        self._on_change: Callable[[], object] = bool
        self._expires_at = clock() + ttl_s
        self._queried = self._hits = 0
        engine.subscribe(self.blocks.apply)

    def when_changed(self, call: Callable[[], object]) -> None:
        """Call this, on the engine's loop, when there may be changes; perhaps several times before they are taken."""
        self._on_change = call

    def register(
        self, static_profile_hash: str, chain: Chain, static_tokens: int, token_ids: Sequence[int], cache_salt: str
    ) -> None:
        """Follow a profile from now on, or note that it is used; takes milliseconds the first time.

        `chain` are the segments inside, each with the number of tokens to its end. A profile without a full block, or with
        more blocks than can be followed, is never found cached.
        """
        now = self._clock()
        if now - self._used.get(static_profile_hash, now - self._ttl_s) < self._ttl_s * _NOTED_SHARE:
            return
        link = self._links.get(static_profile_hash)
        path = link.path if link is not None else self._engine.block_hashes(token_ids[:static_tokens], cache_salt)
        if not 0 < len(path) <= MAX_KEYS:
            return
        self._settle()
        self._used[static_profile_hash] = now
        size = self._engine.limits.block_size
        for name, tokens in (*chain, (static_profile_hash, static_tokens)):
            if blocks := path[: tokens // size]:
                self._forget(self._tree.insert(blocks, name, now))
                self._links.setdefault(name, _Link(tokens, blocks))
                self._gone.discard(name)
                self._look_up(name, now)
        if self._changed or self._gone:
            self._on_change()

    def count(self, prompt_tokens: int, cached_tokens: int) -> None:
        """Note a prompt whose answer has begun, and how many of its tokens the engine found in the cache."""
        self._queried += prompt_tokens
        self._hits += cached_tokens

    def cached(self, link: str) -> Held:
        """Return the tokens of a link that are cached; none if it is not known."""
        self._settle()
        known = self._links.get(link)
        return NOTHING if known is None else known.held

    def changes(self) -> dict[str, Held]:
        """Return what is cached of each link of which that has changed since it was told last; nothing of what is gone."""
        self._settle()
        self._expire()
        told = {
            name: self._links[name].held for name in self._changed if self._links[name].held != self._links[name].told
        }
        for name, held in told.items():
            self._links[name].told = held
        told |= dict.fromkeys(self._gone, NOTHING)
        self._changed, self._gone = set(), set()
        return told

    def everything(self) -> dict[str, Held]:
        """Return what is cached of all links of which anything is; `changes` then begins from here."""
        self.changes()
        return {name: link.held for name, link in self._links.items() if link.held != NOTHING}

    @property
    def facts(self) -> CacheFacts:
        """Return the figures, as of when changes were last taken or a link was asked for."""
        limits = self._engine.limits
        known = self._tree.held(_HERE)[0] * limits.block_size
        return CacheFacts(
            capacity_tokens=limits.cache_tokens,
            known_tokens=known,
            free_tokens=max(0, limits.cache_tokens - known),
            queried_tokens=self._queried,
            hit_tokens=self._hits,
        )

    def _touch(self, blocks: Iterable[bytes]) -> None:
        """Note which part of the tree is to be looked up again."""
        before = len(self._touched)
        self._touched.update(node for block in blocks if (node := self._tree.find(block)) is not None)
        if self._touched and not before:
            self._on_change()

    def _settle(self) -> None:
        """Look up what is held of all links through the parts of the tree that were touched."""
        if self._touched:
            names = {name for node in self._touched for each in node.walk() for name in each.values}
            self._touched = set()
            now = self._clock()
            for name in names:
                self._look_up(name, now)

    def _look_up(self, name: str, now: float) -> None:
        link = self._links[name]
        depths = self.blocks.leading(link.path)
        self._tree.hold(link.path, _HERE, depths, now)
        size, whole = self._engine.limits.block_size, len(link.path)
        gpu, ram, disk = (link.tokens if depth == whole else depth * size for depth in depths)
        if (gpu, ram, disk) != link.held:
            link.held = gpu, ram, disk
            self._changed.add(name)

    def _expire(self) -> None:
        """Forget what was not used for the TTL, unless it is held: that is seen now, as the engine has not said otherwise."""
        if (now := self._clock()) >= self._expires_at:
            self._expires_at = now + self._ttl_s * _NOTED_SHARE
            # In the order of their use, which remains the order in which they would go.
            for name in sorted(self._links, key=lambda name: self._used.get(name, 0.0)):
                if self._links[name].held != NOTHING:
                    self._look_up(name, now)
            self._forget(self._tree.expire(now))

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            if self._links.pop(name).told != NOTHING:
                self._gone.add(name)
            self._changed.discard(name)
            self._used.pop(name, None)
