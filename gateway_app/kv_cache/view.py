"""The fleet's cache as one looks at it: an organization at its own profiles, whoever runs the fleet at all that is held.

What an organization asks costs the same whatever others have: only the links of its own profiles are looked up in Redis.
So neither what it is shown nor the work for that depends on what others have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import redis

from gateway_app.kv_cache import stored
from gateway_app.kv_cache.fleet import Fleet, Worker
from gateway_app.kv_cache.stored import Stored
from gateway_app.kv_cache.tree import Entry, entries
from tasks import cache_hits
from tasks.db import Database
from tasks.errors import QueueUnavailable
from tasks.queueing.keys import QueueKeys

_HASH_DIGITS = 64
#: Profiles that a look at the whole fleet shows at most, and about how many links it reads for that.
MOST_PROFILES = 1000
MOST_LINKS = 50_000
_AWAY = "The queue cannot be reached, so nothing is known of what workers hold."


@dataclass(frozen=True, slots=True)
class Seen:
    """What there was to see at `now`, in seconds since the Unix epoch; `cut` tells that there is more."""

    now: float
    workers: list[Worker]
    entries: list[Entry]
    cut: bool = False


class CacheView:
    """Looks at the caches. Every method raises QueueUnavailable if Redis is away."""

    def __init__(self, database: Database, client: redis.Redis, keys: QueueKeys) -> None:
        self._database = database
        self._client = client
        self._prefix = keys.prefix
        self._fleet = Fleet(client, keys)

    def of(self, found: Sequence[Stored]) -> Seen:
        """Return what is held of some profiles of one organization."""
        try:
            now, workers = self._fleet.workers()
            return Seen(now, workers, self._entries(found, workers, now))
        except redis.RedisError as error:
            raise QueueUnavailable(_AWAY) from error

    def of_fleet(self, worker: str | None, organization: str | None, agent: str | None) -> Seen:
        """Return all that workers hold, or that one holds, or of one organization or of agents of this name."""
        try:
            now, workers = self._fleet.workers()
            workers = [each for each in workers if worker in (None, each.name)]
            links: set[str] = set()
            for each in workers:
                links.update(self._fleet.links(each, MOST_LINKS - len(links)))
            hashes = [link for link in links if len(link) == _HASH_DIGITS]
            found = self._database.read(lambda connection: stored.find(connection, hashes))
            wanted = [
                each for each in found if organization in (None, each.organization) and agent in (None, each.agent)
            ]
            wanted.sort(key=lambda each: (each.organization, each.agent, each.version))
            tree = self._entries(wanted[:MOST_PROFILES], workers, now)
        except redis.RedisError as error:
            raise QueueUnavailable(_AWAY) from error
        return Seen(now, workers, tree, cut=len(wanted) > MOST_PROFILES or len(links) >= MOST_LINKS)

    def _entries(self, found: Sequence[Stored], workers: Sequence[Worker], now: float) -> list[Entry]:
        links = list(dict.fromkeys(link for each in found for link in each.links))
        copies = self._fleet.copies(workers, links)
        hits = cache_hits.read(self._client, self._prefix, links, now)
        return [
            entry
            for _, theirs in groupby(found, key=lambda each: each.organization)
            for entry in entries(list(theirs), copies, hits)
        ]
