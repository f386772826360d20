"""Cancelling a request, queued or running.

The database decides. A queued request ends there and then, and its message leaves the queue; a running one is marked, its
worker is told, and the worker ends it, since only the worker knows what was said so far.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import redis
from sqlalchemy.engine import Connection, Row

from gateway_app.streaming.watch import Watcher
from tasks import lifecycle
from tasks.errors import AlreadyFinished, GatewayError, NotFound
from tasks.idempotency import forget
from tasks.logs import get_logger
from tasks.queueing.message import delivery_tag
from tasks.queueing.publisher import Publisher
from tasks.schema import TERMINAL_STATES
from tasks.stream import FIELD, ended, stream_key

logger = get_logger(__name__)
#: How long the caller waits for a worker to end the request before being told that it will be.
WAIT_S = 1.0
_POLL_S = 0.03


@dataclass(frozen=True, slots=True)
class Canceller:
    """Ends requests that nobody wants any more. `retention_s` is how long a stream outlives its end, in seconds."""

    watcher: Watcher
    publisher: Publisher
    retention_s: int

    def cancel(self, request_id: str, organization: str, wait_s: float = WAIT_S) -> Row[Any]:
        """Cancel the request; return its row, which may still be `running` if its worker takes longer than `wait_s`.

        Cancelling again is no error. Raises NotFound, or AlreadyFinished for a request that ended otherwise.
        """
        before = self.watcher.database.write(lambda on: lifecycle.cancel(on, request_id, organization))
        return self._follow(before, request_id, organization, wait_s)

    def abandon(self, request_id: str, organization: str) -> None:
        """Cancel a request whose only reader went away. With its idempotency key the client may ask anew."""

        def give_up(on: Connection) -> Row[Any] | None:
            before = lifecycle.cancel(on, request_id, organization)
            if before is not None and before.state not in TERMINAL_STATES:
                forget(on, request_id, organization)
            return before

        try:
            self._follow(self.watcher.database.write(give_up), request_id, organization, 0)
        except AlreadyFinished:
            pass
        except GatewayError as error:
            logger.warning("an abandoned request could not be cancelled", request_id=request_id, code=error.code)

    def _follow(self, before: Row[Any] | None, request_id: str, organization: str, wait_s: float) -> Row[Any]:
        """Return the row once the request that was marked has ended, or after `wait_s`."""
        if before is None:
            raise NotFound("there is no such task")
        row = self.watcher.find(request_id, organization)
        if (before.state, row.state) == ("queued", "cancelled") and row.attempt == before.attempt:
            self._tell_watchers(row)
            self.publisher.withdraw(delivery_tag(request_id, row.epoch))
            # A worker may have it in hand already, and wait for MetaQore before it begins.
            self.publisher.stop(request_id)
        elif row.state not in TERMINAL_STATES:
            self.publisher.stop(request_id)
            row = self._ended_within(row, wait_s)
        if row.state in TERMINAL_STATES and row.state != "cancelled":
            raise AlreadyFinished(f"the request has already ended: it is {row.state}")
        return row

    def _ended_within(self, row: Row[Any], wait_s: float) -> Row[Any]:
        deadline = time.monotonic() + wait_s
        while row.state not in TERMINAL_STATES and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            row = self.watcher.find(row.request_id, row.organization)
        return row

    def _tell_watchers(self, row: Row[Any]) -> None:
        data_key = self.watcher.keys.unwrap(row.data_key, row.request_id)
        frame = ended(row.attempt, row.state, row.error_code)
        key = stream_key(self.watcher.prefix, row.request_id)
        try:
            with self.watcher.client.pipeline(transaction=True) as pipe:
                pipe.xadd(key, {FIELD: frame.seal(data_key, row.request_id)}, id=str(frame.cursor))
                pipe.expire(key, self.retention_s)
                pipe.execute()
        except redis.RedisError:
            # They learn of it from the database, one heartbeat later.
            logger.warning("watchers could not be told of a cancel", request_id=row.request_id)
