"""A mark in Redis that says: nothing was lost since all open requests were last looked at.

Whatever empties Redis takes the mark along: FLUSHALL, an empty replacement, a data file that was not there at its start.
Its absence tells the leader to look at all open requests at once. While that goes on the mark is `begun`, and it
becomes `whole` at the end only if it is still there, so that neither a leader's death in the middle nor a second loss
goes unnoticed. Whoever wants everything looked at removes the mark.
"""

from __future__ import annotations

import redis

from tasks.errors import QueueUnavailable

_BEGUN, _WHOLE = b"begun", b"whole"


class Mark:
    """The mark below one prefix of keys."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self._client = client
        self._key = f"{prefix}housekeeper:mark"

    def whole(self) -> bool:
        """Tell whether the last look at everything came to its end, with nothing lost since. Raises QueueUnavailable."""
        try:
            return self._client.get(self._key) == _WHOLE
        except redis.RedisError as error:
            raise QueueUnavailable from error

    def begin(self) -> None:
        """Note that a look at everything begins. Raises QueueUnavailable."""
        self._set(_BEGUN)

    def finish(self) -> None:
        """Note that it has ended; changes nothing if the mark was lost meanwhile. Raises QueueUnavailable."""
        self._set(_WHOLE, only_existing=True)

    def remove(self) -> None:
        """Have everything looked at. Raises QueueUnavailable."""
        try:
            self._client.delete(self._key)
        except redis.RedisError as error:
            raise QueueUnavailable from error

    def _set(self, value: bytes, *, only_existing: bool = False) -> None:
        try:
            self._client.set(self._key, value, xx=only_existing)
        except redis.RedisError as error:
            raise QueueUnavailable from error
