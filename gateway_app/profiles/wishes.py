"""What is wished of the workers' KV caches, as Redis has it: that so many workers have a profile's static part computed.

A gateway only says what is wanted, and looks where it is by now. Workers with nothing better to do ask for it and compute it
(`worker_gpu.warmer`); what they hold is known from their reports. A wish either ends by itself, or lasts until it is ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, cast

import redis

from gateway_app.profiles.active import ActiveProfile
from tasks.queueing.keys import QueueKeys
from tasks.queueing.pull import chain_text
from tasks.queueing.scripts import Scripts


@dataclass(frozen=True, slots=True)
class Wanted:
    """A static part: whose it is, the hash it is stored by, its length in tokens, and its chain (see `tasks.job.Prompt`)."""

    organization: str
    static_profile_hash: str
    static_tokens: int
    chain: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, organization: str, active: ActiveProfile) -> Self:
        """Return that of a profile."""
        return cls(organization, active.static_profile_hash, active.static_token_count, active.chain)


@dataclass(frozen=True, slots=True)
class Seen:
    """Where a static part is: `copies` are wanted in the end, `alive` workers could have one.

    `holders` have all of it on the GPU, `computing` are computing it.
    """

    copies: int
    alive: int
    holders: tuple[str, ...]
    computing: tuple[str, ...]


class Wishes:
    """The wishes in one Redis. Every method raises redis.RedisError if it does not answer."""

    def __init__(self, client: redis.Redis, keys: QueueKeys) -> None:
        self._client = client
        self._scripts = Scripts(client, keys)
        self._wanted, self._awaited = keys.named("wanted"), keys.named("awaited")

    def say(self, wanted: Wanted, copies: int, seconds: float = 0) -> Seen:
        """Wish for copies, for some seconds or, with 0, until the wish is ended; return where it is now.

        A wish that lasts is not changed by one that ends.
        """
        named = (wanted.static_profile_hash, wanted.organization, copies, seconds)
        answer = self._scripts.run("wish", *named, wanted.static_tokens, chain_text(wanted.chain))
        told = [element.decode().split(" ", 1) for element in answer[2:]]
        holders, computing = (tuple(sorted(name for how, name in told if how == what)) for what in ("held", "filling"))
        return Seen(int(answer[0]), int(answer[1]), holders, computing)

    def look(self, wanted: Wanted) -> Seen:
        """Return where it is, wishing for nothing."""
        return self.say(wanted, 0)

    def end(self, static_profile_hash: str) -> None:
        """End a wish. What is computed stays where it is until others need the room."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hdel(self._wanted, static_profile_hash)
            pipe.zrem(self._awaited, static_profile_hash)
            pipe.execute()

    def lasting(self) -> dict[str, int]:
        """Return the copies that are wished for until further notice, by hash; 0 where a wish cannot be read."""
        wishes = cast("Iterator[tuple[bytes, bytes]]", self._client.hscan_iter(self._wanted))
        found = {name.decode(errors="replace"): _copies(text) for name, text in wishes}
        return {name: copies for name, copies in found.items() if copies is not None}


def _copies(text: bytes) -> int | None:
    """Return how many copies a wish asks for, None if it ends by itself."""
    try:
        wish = json.loads(text)
        return None if wish["until"] else int(wish["copies"])
    except (ValueError, KeyError, TypeError):
        return 0
