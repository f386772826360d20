"""A bounded cache whose values are made once, however many threads want one at the same time.

The first thread that misses makes the value, without holding the lock; the others wait for it. A failure is told to
all who waited, each in an exception of its own, and not kept. The least recently used values go first, once there are
too many or they weigh too much.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

from tasks.errors import GatewayError

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class OnceCache(Generic[K, V]):
    """Keeps up to `max_count` values that together weigh up to `max_weight`, as `weigh` weighs them."""

    def __init__(self, max_count: int, max_weight: int, weigh: Callable[[V], int]) -> None:
        self._max_count = max_count
        self._max_weight = max_weight
        self._weigh = weigh
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._weight = 0
        self._making: dict[K, Future[V]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of `key`; if it is not kept, what `make` returns. Raises what `make` raises."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            future = self._making.get(key)
            if mine := future is None:
                future = self._making[key] = Future()
        return self._make(key, make, future) if mine else _result(future)

    def put(self, key: K, value: V) -> None:
        """Keep a value that was made elsewhere."""
        with self._lock:
            self._keep(key, value)

    def _make(self, key: K, make: Callable[[], V], future: Future[V]) -> V:
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, value)
        future.set_result(value)
        return value

    def _keep(self, key: K, value: V) -> None:
        if key in self._kept:
            self._weight -= self._kept.pop(key)[1]
        weight = self._weigh(value)
        self._kept[key] = value, weight
        self._weight += weight
        while len(self._kept) > self._max_count or (self._weight > self._max_weight and len(self._kept) > 1):
            self._weight -= self._kept.popitem(last=False)[1][1]


def _result(future: Future[V]) -> V:
    try:
        return future.result()
    except GatewayError as error:
        # Whoever gets an error writes its own request's id into it.
        raise type(error)(error.detail, **error.extensions) from None
