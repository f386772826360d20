"""What workers reported of themselves and of their KV caches, read from Redis.

A worker reports at least once a second. One that has been silent for as long as the queue's scripts wait counts as dead
there, and nothing here is told of its cache, which has probably gone with it. What is in Redis may have been written by
anybody: what is not as a worker writes it is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast

import redis
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError

from tasks.queueing.keys import QueueKeys
from tasks.queueing.pull import Held

#: As tasks/queueing/common.lua has it, in seconds.
DEAD_S = 6.0
#: Links that are read of one worker at a time.
_AT_ONCE = 1000
_HELD = re.compile(rb"(\d{1,15}) (\d{1,15}) (\d{1,15})")
#: By link, by worker: the tokens of the link's prefix that the worker holds.
Copies = Mapping[str, Mapping[str, Held]]


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Facts(_Written):
    """What a worker said of itself: of its KV cache in tokens, of its speed in tokens a second.

    `free_tokens` can be had without evicting a prefix that is known, `known_tokens` are those of known prefixes. `running`
    requests have `load` tokens in hand. Of `queried_tokens` since the worker's start, `hit_tokens` were cached.
    """

    state: str = ""
    model: str = ""
    capacity_tokens: NonNegativeInt = 0
    free_tokens: NonNegativeInt = 0
    known_tokens: NonNegativeInt = 0
    running: NonNegativeInt = 0
    load: NonNegativeInt = 0
    prefill_rate: NonNegativeFloat = 0.0
    ram_rate: NonNegativeFloat = 0.0
    disk_rate: NonNegativeFloat = 0.0
    queried_tokens: NonNegativeInt = 0
    hit_tokens: NonNegativeInt = 0

    @property
    def hit_rate(self) -> float | None:
        """Return the share of prompt tokens that were found in the cache, None before there were any."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else None


class Worker(_Written):
    """A worker that lives, and how many seconds ago it was last heard of."""

    name: str
    age_s: float
    facts: Facts


class _Report(_Written):
    facts: Facts


class Fleet:
    """Reads from `client`. Every method raises redis.RedisError if that does not answer."""

    def __init__(self, client: redis.Redis, keys: QueueKeys) -> None:
        self._client = client
        self._keys = keys

    def workers(self) -> tuple[float, list[Worker]]:
        """Return Redis's time, in seconds since the Unix epoch, and the workers that live, by name."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zrange(self._keys.named("alive"), 0, -1, withscores=True)
            pipe.hgetall(self._keys.named("facts"))
            (seconds, microseconds), alive, reports = cast(
                "tuple[tuple[int, int], list[tuple[bytes, float]], dict[bytes, bytes]]", pipe.execute()
            )
        now = seconds + microseconds / 1e6
        found = []
        for name, seen in alive:
            if now - seen < DEAD_S and (facts := _facts(reports.get(name))) is not None:
                found.append(Worker(name=name.decode("utf-8", "replace"), age_s=max(0.0, now - seen), facts=facts))
        return now, sorted(found, key=lambda worker: worker.name)

    def copies(self, workers: Sequence[Worker], links: Sequence[str]) -> Copies:
        """Return what the workers hold of some links."""
        asked = [
            (worker.name, links[at : at + _AT_ONCE]) for worker in workers for at in range(0, len(links), _AT_ONCE)
        ]
        with self._client.pipeline(transaction=False) as pipe:
            for name, part in asked:
                pipe.hmget(self._cache(name), list(part))
            answers = cast("list[list[bytes | None]]", pipe.execute()) if asked else []
        found: dict[str, dict[str, Held]] = {link: {} for link in links}
        for (name, part), values in zip(asked, answers, strict=True):
            for link, value in zip(part, values, strict=True):
                if (held := _held(value)) is not None:
                    found[link][name] = held
        return found

    def links(self, worker: Worker, most: int) -> list[str]:
        """Return the links that a worker holds anything of; about `most` of them, if there are more."""
        found: list[str] = []
        cursor = 0
        while len(found) < most:
            scanned = self._client.hscan(self._cache(worker.name), cursor, count=_AT_ONCE)
            cursor, part = cast("tuple[int, dict[bytes, bytes]]", scanned)
            found += [link.decode("ascii", "replace") for link in part]
            if cursor == 0:
                break
        return found

    def _cache(self, worker: str) -> str:
        return self._keys.named(f"cache:{worker}")


def _facts(written: bytes | None) -> Facts | None:
    try:
        return None if written is None else _Report.model_validate_json(written).facts
    except ValidationError:
        return None


def _held(written: bytes | None) -> Held | None:
    if written is None or (match := _HELD.fullmatch(written)) is None:
        return None
    gpu, ram, disk = map(int, match.groups())
    return (gpu, ram, disk) if disk > 0 else None
