"""A circuit breaker: a server that fails again and again is left alone for a while.

Closed, every call goes through, and failures in a row are counted. When there are enough it opens: nothing goes
through for a time. Then it is half open: one call, the probe, goes through, and its result closes the breaker or
opens it anew. Each change of state begins a new era, and a result counts only in the era its call was let through
in, so that a call from before cannot speak for the probe.

The libraries for this hold their lock while the call runs, which makes a hanging server a queue of waiting threads.
Here nothing runs inside the breaker. All its methods are called from one thread, that of the event loop.
"""

from __future__ import annotations

from collections.abc import Callable

from tasks.logs import get_logger
from tasks.metrics import shared as metrics

logger = get_logger(__name__)


class Breaker:
    """Opens after `failures` in a row, for `open_s`. `clock` returns seconds and never goes back."""

    def __init__(self, failures: int, open_s: float, clock: Callable[[], float]) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._opened_at: float | None = None
        self._probing = False
        self._era = 0

    def admit(self) -> int | None:
        """Return a ticket for `record` if a call may be made now, else None."""
        if self._opened_at is not None:
            if self._probing or self._clock() < self._opened_at + self._open_s:
                return None
            self._probing = True
            self._era += 1
        return self._era

    def record(self, ticket: int, failure: str | None) -> None:
        """Count what came of the call that `ticket` let through: `failure` names what went wrong, if anything did.

        Every ticket must be recorded, or the probe would never be over.
        """
        if ticket != self._era:
            return
        if failure is None:
            if self._opened_at is not None:
                logger.warning("MetaQore answers again")
                self._opened_at, self._probing = None, False
                metrics.BREAKER_OPEN.set(0)
                self._era += 1
            self._failures = 0
            return
        self._failures += 1
        if self._probing or self._failures >= self._limit:
            if self._opened_at is None:
                logger.warning("MetaQore failed several times in a row", count=self._failures, code=failure)
            self._opened_at, self._probing = self._clock(), False
            metrics.BREAKER_OPEN.set(1)
            self._era += 1
