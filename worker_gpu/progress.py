"""A delivered request on its way through the worker, as far as others in the queue wait for it.

Between delivery and first token its prompt counts as work that the engine still has to do, except while it waits for something
else: other requests may be computed meanwhile. When that is over, more is asked for at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tasks.metrics import worker as metrics
from worker_gpu.admission import Admission
from worker_gpu.cache import CacheIndex
from worker_gpu.delivery import Delivery
from worker_gpu.engines.base import Delta, EngineLimits


class Progress:
    """Tells `admission` how far a delivery is, and calls `on_room` whenever there may be room for others."""

    def __init__(
        self,
        delivery: Delivery,
        admission: Admission,
        cache: CacheIndex,
        limits: EngineLimits,
        on_room: Callable[[], object],
    ) -> None:
        self._delivery, self._admission, self._cache, self._limits = delivery, admission, cache, limits
        self._on_room = on_room
        self._taken = admission.deliver(delivery.prompt_tokens, delivery.cached_tokens, delivery.share)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Do not count the request as in flight while it waits for what is no work of the engine."""
        self._admission.pause(self._taken)
        self._on_room()
        try:
            yield
        finally:
            self._admission.go_on(self._taken)

    def begin(self, delta: Delta) -> None:
        """Note the first token."""
        self._admission.begin(self._taken, delta.cached_tokens, delta.prefill_s, time.monotonic())
        self._cache.count(self._delivery.prompt_tokens, delta.cached_tokens)
        if (decision := self._delivery.decision) is not None:
            found = min(delta.cached_tokens, decision.winner.static)
            metrics.predicted(decision.predicted_tokens, found, self._limits.block_size)
        self._on_room()

    def end(self) -> None:
        """Note that the request is no longer in hand."""
        self._admission.end(self._taken)
        self._on_room()
