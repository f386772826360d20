"""A request's frames in order, from a cursor to the end, wherever they are at the moment.

A running request's frames come from the relay. A finished one's are read from Redis, or, when Redis has forgotten
them or never got the last one, made again from SQL. A watcher may see the move from one to the other only as frames
that go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import redis
from sqlalchemy.engine import Row

from gateway_app.streaming.relay import RawEntry, Relay
from tasks import lifecycle, requests_read, tracing
from tasks.crypto import KeyWrapper, unseal
from tasks.db import Database, now
from tasks.errors import InvalidCursor, NotFound
from tasks.ids import is_request_id
from tasks.job import Result, TaskRequest
from tasks.schema import TERMINAL_STATES
from tasks.stream import FIELD, START, Cursor, Frame, ended, replay, stream_key


@dataclass(frozen=True, slots=True)
class Watcher:
    """Reads requests and their streams, for the organization they belong to."""

    database: Database
    client: redis.Redis
    relay: Relay
    keys: KeyWrapper
    prefix: str
    heartbeat_s: float

    def find(self, request_id: str, organization: str) -> Row[Any]:
        """Return the request's row. Raises NotFound for what is no id, an unknown one, and another organization's."""
        if not is_request_id(request_id):
            raise NotFound("there is no such task")
        row = requests_read.found(self.database, request_id, organization)
        if row is not None and row.state == "queued" and row.deadline is not None and row.deadline <= now():
            # No worker took it in time, and none may come to notice.
            self.database.write(lambda connection: lifecycle.expire(connection, request_id))
            row = requests_read.found(self.database, request_id, organization)
        if row is None:
            raise NotFound("there is no such task")
        if (span := tracing.current()).recording:
            span.set({"metaqore.request.id": request_id})
            span.link(row.trace_context)
        return row

    def request(self, row: Row[Any]) -> TaskRequest:
        """Return what was asked for."""
        data_key = self.keys.unwrap(row.data_key, row.request_id)
        return TaskRequest.model_validate_json(unseal(data_key, row.payload, f"payload:{row.request_id}"))

    def result(self, row: Row[Any]) -> Result | None:
        """Return the answer stored for a request, if it has one."""
        if row.result is None:
            return None
        data_key = self.keys.unwrap(row.data_key, row.request_id)
        return Result.model_validate_json(unseal(data_key, row.result, f"result:{row.request_id}"))

    def frames(self, row: Row[Any], cursor: Cursor, silence_s: float | None = None) -> Iterable[Frame | None]:
        """Return the frames after `cursor` up to the terminal one.

        None marks a silence of `silence_s` seconds, `heartbeat_s` unless given.

        Of a finished request it is a list, empty if `cursor` is at the end.

        Raises InvalidCursor if the stream has not come as far as `cursor`.
        """
        if cursor.attempt > row.attempt:
            raise InvalidCursor
        if row.state in TERMINAL_STATES:
            stored = self._stored(row)
            if cursor > stored[-1].cursor:
                raise InvalidCursor
            return [frame for frame in stored if frame.cursor > cursor]
        return self._live(row, cursor, silence_s or self.heartbeat_s)

    def is_kept(self, row: Row[Any], cursor: Cursor) -> bool:
        """Tell whether Redis still has the end of a finished request's stream, and `cursor` lies before it."""
        try:
            entries = cast("list[RawEntry]", self.client.xrevrange(stream_key(self.prefix, row.request_id), count=1))
        except redis.RedisError:
            return False
        data_key = self.keys.unwrap(row.data_key, row.request_id)
        ends = [_unsealed(row.request_id, data_key, entry) for entry in entries]
        return any(last.terminal and cursor < last.cursor for last in ends)

    def _live(self, row: Row[Any], cursor: Cursor, silence_s: float) -> Iterator[Frame | None]:
        data_key = self.keys.unwrap(row.data_key, row.request_id)
        subscription = self.relay.subscribe(row.request_id, cursor)
        quiet_s = 0.0
        try:
            while True:
                entry = subscription.next(silence_s)
                if entry is not None:
                    quiet_s = 0.0
                    frame = Frame.unseal(data_key, row.request_id, *entry)
                    if frame.cursor.follows(cursor):
                        cursor = frame.cursor
                        yield frame
                        if frame.terminal:
                            return
                        continue
                    # Redis lost what lies between. It is all in SQL once the request has ended; until then, silence.
                    if not frame.terminal:
                        yield None
                        continue
                    row = self.find(row.request_id, row.organization)
                    yield from (frame for frame in self._stored(row) if frame.cursor > cursor)
                    return
                yield None
                quiet_s += silence_s
                if quiet_s < self.heartbeat_s:
                    continue
                quiet_s = 0.0
                # A long silence: perhaps the request ended without a word, its worker lost after the commit.
                row = self.find(row.request_id, row.organization)
                if row.state in TERMINAL_STATES:
                    yield from (frame for frame in self._stored(row) if frame.cursor > cursor)
                    return
        finally:
            subscription.close()

    def _stored(self, row: Row[Any]) -> list[Frame]:
        """Return all frames of a finished request."""
        frames = self._in_redis(row)
        cursors = [START, *(frame.cursor for frame in frames)]
        whole = all(cursor.follows(before) for before, cursor in pairwise(cursors))
        if frames and frames[-1].terminal and whole:
            return frames
        result = self.result(row)
        if result is not None:
            return list(replay(row.attempt, result, row.state, row.error_code))
        return [ended(row.attempt, row.state, row.error_code)]

    def _in_redis(self, row: Row[Any]) -> list[Frame]:
        try:
            entries = cast("list[RawEntry]", self.client.xrange(stream_key(self.prefix, row.request_id)))
        except redis.RedisError:
            return []
        data_key = self.keys.unwrap(row.data_key, row.request_id)
        return [_unsealed(row.request_id, data_key, entry) for entry in entries]


def _unsealed(request_id: str, data_key: bytes, entry: RawEntry) -> Frame:
    raw_id, fields = entry
    return Frame.unseal(data_key, request_id, Cursor.parse(raw_id.decode()), fields[FIELD])
