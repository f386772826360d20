"""A cache of answers that take a while: bounded, for seconds, and one call for all who ask at once.

What is kept is the future of the answer. Who asks for a key gets the future of a kept answer, which is done, or of the
call that is under way, or of a new call. So many that ask for one key at once make one call, and each waits as long
as it likes. A failure is an answer like any other, only kept for another time: `keep_s` tells for how long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

from cachetools import TLRUCache

Answer = TypeVar("Answer")


class Cache(Generic[Answer]):
    """Keeps the answers of `call`, which must not block, and whose futures must not hold an exception.

    `clock` returns seconds and never goes back.
    """

    def __init__(
        self,
        call: Callable[[str], Future[Answer]],
        keep_s: Callable[[Answer], float],
        size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call = call
        self._lock = Lock()
        self._under_way: dict[str, Future[Answer]] = {}
        self._kept: TLRUCache[str, Future[Answer]] = TLRUCache(
            size, lambda _key, future, now: now + keep_s(future.result()), timer=clock
        )

    def ask(self, key: str) -> Future[Answer]:
        """Return the future of the answer."""
        with self._lock:
            future = self._kept.get(key) or self._under_way.get(key)
            if future is not None:
                return future
            future = self._under_way[key] = self._call(key)
        # Outside of the lock: a future that is done already calls back at once.
        future.add_done_callback(lambda done: self._keep(key, done))
        return future

    def _keep(self, key: str, future: Future[Answer]) -> None:
        with self._lock:
            del self._under_way[key]
            if not future.cancelled():
                self._kept[key] = future
