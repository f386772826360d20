"""Which requests Redis has lost, and publishing them again.

    open in SQL, unknown to Redis ─┬─ queued  ─▶ lost
                                   └─ running ─▶ lost if it stays unknown for three renewal periods

A worker renews the lease of what it runs every few seconds, and tells Redis anew of a message that Redis has
forgotten. So a running request is given up only when nobody has done that for as long as three renewals take, and
Redis could be reached all the while.

Publishing again raises the request's epoch in SQL under the condition that its epoch and attempt are still those that
were read: one that has moved on meanwhile is left alone, and the message of an earlier epoch starts nothing any more.
The new message is put into Redis after that commit. What Redis does not take is kept and put later; if this process dies
before, the request is found lost once more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from sqlalchemy.engine import Connection

from gateway_app.housekeeping.walk import PAGE, OpenRequest
from tasks import lifecycle, tracing
from tasks.db import Database, now
from tasks.ids import made_at
from tasks.logs import get_logger
from tasks.metrics import housekeeper as metrics
from tasks.queueing.message import MessageCodec, Queued, delivery_tag
from tasks.queueing.publisher import Publisher
from tasks.tracing.messaging import PUBLISH, publishing

#: Requests that are published again in one transaction: few, so that gateways get at the database in between.
AT_ONCE = 50
#: Running requests that are watched for their worker at a time. Another walk comes upon those beyond.
MAX_SUSPECTS = 10_000
logger = get_logger(__name__)


class Losses:
    """Looks for lost requests. `patience_s` is how long a running one may be unknown to Redis, in seconds.

    `clock` tells the time in seconds from any beginning. Used by one thread.
    """

    def __init__(
        self,
        database: Database,
        publisher: Publisher,
        codec: MessageCodec,
        *,
        max_publications: int,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database, self._publisher, self._codec = database, publisher, codec
        self._max_publications = max_publications
        self._patience_s = patience_s
        self._clock = clock
        self._suspects: dict[str, tuple[float, OpenRequest]] = {}
        self._unsent: deque[Queued] = deque()

    def look(self, rows: Sequence[OpenRequest]) -> int:
        """Publish again which of `rows` Redis has lost; return how many those were.

        Raises QueueUnavailable or DatabaseUnavailable; then some may be left for another look.
        """
        self.send()
        unknown = self._publisher.unknown([row.tag for row in rows]) if rows else set()
        lost = []
        for row in rows:
            if row.tag not in unknown:
                self._suspects.pop(row.tag, None)
            elif not row.running or self._given_up(row):
                lost.append(row)
        # In one order everywhere: two leaders that locked the same rows in different ones would deadlock.
        lost.sort(key=lambda row: row.request_id)
        for begin in range(0, len(lost), AT_ONCE):
            self._publish_again(lost[begin : begin + AT_ONCE])
        return len(lost)

    def look_again(self) -> None:
        """Look once more at the running requests that were unknown the last time. Raises as `look` does."""
        rows = [row for _, row in self._suspects.values()]
        for begin in range(0, len(rows), PAGE):
            self.look(rows[begin : begin + PAGE])

    def forgive(self) -> None:
        """Begin the patience with running requests anew: their workers could not reach Redis either."""
        self._suspects.clear()

    def send(self) -> None:
        """Put what was published again and did not reach Redis. Raises QueueUnavailable."""
        while self._unsent:
            self._publisher.publish(self._unsent[0])
            self._unsent.popleft()

    def _given_up(self, row: OpenRequest) -> bool:
        """Tell whether a running request was unknown for too long; note since when it is."""
        at = self._clock()
        since, _ = self._suspects.get(row.tag, (at, row))
        if at - since >= self._patience_s:
            self._suspects.pop(row.tag, None)
            return True
        if row.tag in self._suspects or len(self._suspects) < MAX_SUSPECTS:
            self._suspects[row.tag] = since, row
        return False

    def _publish_again(self, rows: Sequence[OpenRequest]) -> None:
        def raise_epochs(connection: Connection) -> list[lifecycle.Republished]:
            raised = [
                lifecycle.republish(
                    connection, row.request_id, row.epoch, row.attempt, max_epochs=self._max_publications
                )
                for row in rows
            ]
            return [row for row in raised if row is not None]

        raised = self._database.write(raise_epochs)
        if raised:
            logger.warning(
                "Redis lost requests, such as this one; queueing them again",
                lost=len(raised),
                request_id=raised[0].request_id,
            )
        for request in raised:
            metrics.OUTBOX.observe(max(0.0, (now() - made_at(request.request_id)).total_seconds()))
        self._unsent.extend(map(self._again, raised))
        self.send()

    def _again(self, request: lifecycle.Republished) -> Queued:
        """Return the message, under a span of its own in the request's trace if that is recorded."""
        if request.trace_context is None:
            return self._codec.again(request)
        attributes = publishing(delivery_tag(request.request_id, request.epoch)) | {"metaqore.epoch": request.epoch}
        with tracing.begin(PUBLISH, "producer", request.trace_context, attributes) as span:
            return self._codec.again(request, span.context)
