"""What a worker has in hand, and how it is stopped.

Each message that is being run has a scope, from the moment it is taken until it is let go. Whoever wants it to end says why,
once: the first reason counts, be it a deadline that passed before. What waits in the scope's bounds is then interrupted,
and the runner does what belongs to the reason; what is being committed is not interrupted, and looks for a reason afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal

#: `cancelled`: nobody wants it. `lease_lost`: its message is another worker's by now. `superseded`: the message is taken
#: again by this very worker, `republished`: a newer one of the same request is. `worker_draining`, `engine_dead`: another
#: worker shall do it.
Reason = Literal["cancelled", "lease_lost", "superseded", "republished", "worker_draining", "engine_dead"]


#: What became of a request by one run of it: how it ended, that it waits again (`queued`), or that somebody else has it
#: (`fenced`).
Outcome = Literal["completed", "failed", "cancelled", "expired", "dead", "queued", "fenced"]


class Scope:
    """What is done here for one message.

    `reason` is why it was stopped, if it was. `interrupted` tells that something was broken off for that, or, without a
    reason, because its time was over. `begun` tells that an attempt has been, or is just being, recorded; `outcome` what became of
    the request.
    """

    def __init__(self, tag: str, request_id: str, epoch: int) -> None:
        self.tag = tag
        self.epoch = epoch
        self.request_id = request_id
        self.reason: Reason | None = None
        self.interrupted = False
        self.begun = False
        self.outcome: Outcome = "queued"
        self._limit: asyncio.Timeout | None = None

    @property
    def is_ending(self) -> bool:
        """Tell whether it was interrupted, or is just being."""
        return self.interrupted or (self._limit is not None and self._limit.expired())

    def stop(self, reason: Reason) -> None:
        """End it now. If it is ending already, it is for the reason that came first."""
        if self.reason is None and not self.is_ending:
            self.reason = reason
            if self._limit is not None:
                self._limit.reschedule(asyncio.get_running_loop().time())

    @asynccontextmanager
    async def bounds(self, limit_s: float | None = None) -> AsyncIterator[None]:
        """Bound what is done within by `stop` and by so many seconds; being interrupted is no error."""
        limit = asyncio.timeout(limit_s if self.reason is None else 0)
        self.interrupted = self.reason is not None
        try:
            async with limit:
                self._limit = limit
                yield
        except TimeoutError:
            if not limit.expired():
                # One of what was done within.
                raise
            self.interrupted = True
        finally:
            self._limit = None


class Scopes:
    """The newest scope of each request that this worker has in hand, by request id."""

    def __init__(self) -> None:
        self._open: dict[str, Scope] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __getitem__(self, request_id: str) -> Scope:
        return self._open[request_id]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._open))

    @contextmanager
    def open(self, tag: str, request_id: str, epoch: int) -> Iterator[Scope]:
        """Return a scope for a message, until the end of the block. An older one of its request is stopped.

        A message of an epoch that is past stops nothing, and leads nowhere.
        """
        scope, older = Scope(tag, request_id, epoch), self._open.get(request_id)
        if older is None or older.epoch <= epoch:
            self._open[request_id] = scope
            if older is not None:
                # It is fenced off, so nobody wants it.
                older.stop("superseded" if older.epoch == epoch else "republished")
        try:
            yield scope
        finally:
            if self._open.get(request_id) is scope:
                del self._open[request_id]

    def stop(self, request_id: str, reason: Reason) -> None:
        """Stop a request, if it is here."""
        if (scope := self._open.get(request_id)) is not None:
            scope.stop(reason)

    def lose(self, tag: str) -> None:
        """Stop the run of a message whose lease is another's."""
        for scope in tuple(self._open.values()):
            if scope.tag == tag:
                scope.stop("lease_lost")

    def stop_all(self, reason: Reason, *, but_begun: bool = False) -> None:
        """Stop everything, or everything but what has begun."""
        for scope in tuple(self._open.values()):
            if not (but_begun and scope.begun):
                scope.stop(reason)
