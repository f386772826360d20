"""One leader among any number of housekeepers: a key in Redis that its holder renews.

Whoever finds no key becomes the leader. The key ends by itself, so that a leader that was killed is replaced after
`TTL_S`. The lock only saves work: two leaders at once, as after a pause of the first, do no harm, since a request is
published again only under the condition that nobody else has changed it.
"""

from __future__ import annotations

import secrets

import redis

from tasks.errors import QueueUnavailable

TTL_S = 6.0
#: Renews or takes the key: KEYS the key; ARGV who asks, and for how many milliseconds.
_HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RESIGN = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 1"


class Leadership:
    """One housekeeper's claim to lead."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._client = client
        self._key = _key(prefix)
        self._holder = secrets.token_hex(8)
        self._hold = client.register_script(_HOLD)
        self._resign = client.register_script(_RESIGN)

    def hold(self) -> bool:
        """Take or renew the leadership; tell whether it is ours. Raises QueueUnavailable."""
        try:
            return bool(self._hold(keys=[self._key], args=[self._holder, int(TTL_S * 1000)]))
        except redis.RedisError as error:
            raise QueueUnavailable from error

    def resign(self) -> None:
        """Let another lead at once, if this one does. Raises QueueUnavailable; then it takes `TTL_S`."""
        try:
            self._resign(keys=[self._key], args=[self._holder])
        except redis.RedisError as error:
            raise QueueUnavailable from error


def somebody_leads(client: redis.Redis, prefix: str) -> bool:
    """Tell whether a housekeeper is at work. Raises redis.RedisError."""
    return bool(client.exists(_key(prefix)))


def _key(prefix: str) -> str:
    return f"{prefix}housekeeper"
