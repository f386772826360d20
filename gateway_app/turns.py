"""A few at a time: of a crowd that arrives together, the first are through before the last have begun.

Python runs one thread at a time. Of a hundred threads that take a request in at once, each waits at every step for all the
others, so the first request reaches the queue hardly before the last, and the engine waits for a crowd that could have come one
by one. With turns the queue is filled as fast, and from the first moment on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Enough that while one waits for a commit or for Redis others compute, and that commits are shared.
AT_ONCE = 8
#: A turn is a courtesy. Those who have theirs may wait for a database that does not answer; the others must not wait for them.
PATIENCE_S = 0.5


class Turns:
    """Lets up to `at_once` threads through at a time, and whoever has waited for `patience_s` seconds."""

    def __init__(self, at_once: int = AT_ONCE, patience_s: float = PATIENCE_S) -> None:
        self._free = threading.Semaphore(at_once)
        self._patience_s = patience_s

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn, and have it for as long as the block runs."""
        taken = self._free.acquire(timeout=self._patience_s)
        try:
            yield
        finally:
            if taken:
                self._free.release()
