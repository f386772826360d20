"""How often KV caches had what requests asked of them: counted for each link of a profile's chain, and kept in Redis.

Workers add what they count, gateways read it. Counts lie in a hash for each hour of the clock, which ends by itself when
the hour after it is over. So what is read covers one to two hours, and Redis holds no more than the links that were asked
for in that time, however many there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import redis

HOUR_S = 3600
#: Adds to a hash: KEYS has its name; ARGV how long it is kept, in seconds, and then a link and its five numbers, again and again.
ADD = """
for at = 2, #ARGV, 6 do
  local sums = {}
  for number in string.gmatch(redis.call('HGET', KEYS[1], ARGV[at]) or '', '%d+') do
    sums[#sums + 1] = number
  end
  for place = 1, 4 do
    sums[place] = string.format('%.0f', ARGV[at + place] + (sums[place] or 0))
  end
  sums[5] = string.format('%.0f', math.max(ARGV[at + 5], sums[5] or 0))
  redis.call('HSET', KEYS[1], ARGV[at], table.concat(sums, ' ', 1, 5))
end
redis.call('EXPIRE', KEYS[1], ARGV[1])
"""
_WRITTEN = re.compile(rb"(\d{1,18}) (\d{1,18}) (\d{1,18}) (\d{1,18}) (\d{1,18})")


@dataclass(frozen=True, slots=True)
class Hits:
    """What requests found of one link: how many asked for it, and how many found all of it, as far as blocks are whole.

    `asked` and `found` are tokens. `last` is when it was asked for last, in seconds since the Unix epoch, 0 for never.
    """

    requests: int = 0
    hits: int = 0
    asked: int = 0
    found: int = 0
    last: float = 0.0

    @property
    def rate(self) -> float | None:
        """Return the share of the tokens that were found, None if none were asked for."""
        return self.found / self.asked if self.asked else None

    def __add__(self, other: Hits) -> Hits:
        """Return both together."""
        return Hits(
            self.requests + other.requests,
            self.hits + other.hits,
            self.asked + other.asked,
            self.found + other.found,
            max(self.last, other.last),
        )


def added(prefix: str, counted: Mapping[str, Hits], at: float) -> tuple[list[str], list[str | int]]:
    """Return the keys and arguments with which `ADD` adds what was counted, at a time in seconds since the Unix epoch."""
    arguments: list[str | int] = [2 * HOUR_S]
    for link, hits in counted.items():
        arguments += [link, hits.requests, hits.hits, hits.asked, hits.found, int(hits.last)]
    return [_hour(prefix, int(at // HOUR_S))], arguments


def read(client: redis.Redis, prefix: str, links: Sequence[str], at: float) -> dict[str, Hits]:
    """Return what was counted of each link in this hour and the one before. Raises redis.RedisError."""
    if not links:
        return {}
    hour = int(at // HOUR_S)
    with client.pipeline(transaction=False) as pipe:
        for each in (hour - 1, hour):
            pipe.hmget(_hour(prefix, each), list(links))
        before, now = cast("list[list[bytes | None]]", pipe.execute())
    return {link: _hits(one) + _hits(other) for link, one, other in zip(links, before, now, strict=True)}


def _hits(written: bytes | None) -> Hits:
    """Return what was counted; what somebody else wrote counts nothing."""
    found = _WRITTEN.fullmatch(written) if written is not None else None
    return Hits(*map(int, found.groups())) if found is not None else Hits()


def _hour(prefix: str, hour: int) -> str:
    return f"{prefix}cache-hits:{hour}"
