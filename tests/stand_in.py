"""A test in a worker's place: it writes frames and records answers as a worker does, one step at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
import sqlalchemy as sa

from tasks import lifecycle, requests_read
from tasks.crypto import KeyWrapper, seal, unseal
from tasks.db import Database
from tasks.errors import AttemptsExhausted
from tasks.ids import new_request_id
from tasks.job import FinishReason, Piece, Result, TaskRequest, Timings, Usage
from tasks.lifecycle import Attempt
from tasks.schema import requests as table
from tasks.settings import settings
from tasks.stream import FIELD, Frame, ended, replay, stream_key
from tests.services import wait_until


class StandIn:
    """A worker, one step at a time."""

    def __init__(self) -> None:
        self.database = Database(settings().database)
        self.redis = redis.Redis.from_url(settings().gateway.request_queue_url)
        self._keys = KeyWrapper(settings().secrets.keys("master_key"))
        self._data_keys: dict[str, bytes] = {}

    def close(self) -> None:
        """End its connections."""
        self.database.close()
        self.redis.close()

    def start(self, request_id: str) -> Attempt:
        """Begin an attempt."""
        started = self.database.write(lambda connection: lifecycle.start(connection, request_id, 1, "test", 3))
        assert isinstance(started, Attempt)
        return started

    def send(self, request_id: str, *frames: Frame) -> None:
        """Write frames to the stream."""
        for frame in frames:
            sealed = frame.seal(self._data_key(request_id), request_id)
            self.redis.xadd(stream_key("metaqore:", request_id), {FIELD: sealed}, id=str(frame.cursor))

    def record(self, attempt: Attempt, answer: Result) -> None:
        """Record the answer."""
        request_id = attempt.subject.request_id
        sealed = seal(self._data_key(request_id), answer.model_dump_json().encode(), f"result:{request_id}")
        assert self.database.write(lambda connection: lifecycle.answer(connection, attempt, answer, sealed))

    def fail(self, attempt: Attempt, code: str) -> None:
        """Record a failure, and tell of it."""
        self.database.write(lambda connection: lifecycle.finish(connection, attempt, "failed", code=code))
        self.send(attempt.subject.request_id, ended(attempt.number, "failed", code))

    def give_back(self, attempt: Attempt, code: str, max_attempts: int = 3) -> str:
        """Record that the attempt ended without an answer, and tell of it if that was the last one."""
        given = self.database.write(
            lambda connection: lifecycle.give_back(connection, attempt, code, max_attempts=max_attempts)
        )
        if given == "dead":
            self.send(attempt.subject.request_id, ended(attempt.number, "dead", AttemptsExhausted.code))
        return given

    def run(self, request_id: str, answer: Result) -> None:
        """Run a request from its start to its end."""
        attempt = self.start(request_id)
        self.record(attempt, answer)
        self.send(request_id, *replay(attempt.number, answer))

    def payload(self, request_id: str) -> TaskRequest:
        """Return what was asked for."""
        sealed = self._row(request_id).payload
        return TaskRequest.model_validate_json(unseal(self._data_key(request_id), sealed, f"payload:{request_id}"))

    @contextmanager
    def answering(self, answer: Result) -> Iterator[list[str]]:
        """Answer the next request in another thread; the list gets its id."""
        query = sa.select(table.c.request_id).where(table.c.request_id > new_request_id())
        taken: list[str] = []

        def run() -> None:
            found = wait_until(
                lambda: self.database.read(lambda connection: connection.execute(query).scalars().all()),
                20,
                "a request",
            )
            taken.extend(found)
            self.run(found[0], answer)

        thread = threading.Thread(target=run)
        thread.start()
        yield taken
        thread.join()

    def _row(self, request_id: str) -> Any:
        return self.database.read(lambda connection: requests_read.find(connection, request_id, "default"))

    def _data_key(self, request_id: str) -> bytes:
        if request_id not in self._data_keys:
            self._data_keys[request_id] = self._keys.unwrap(self._row(request_id).data_key, request_id)
        return self._data_keys[request_id]


def result(*pieces: Piece, reason: FinishReason | None = "stop") -> Result:
    """Return an answer of these pieces."""
    usage = Usage(prompt_tokens=9, cached_tokens=4, output_tokens=7)
    timings = Timings(queued_ms=1, total_ms=2)
    return Result(pieces=pieces, finish_reasons=(reason,) if reason else (), model="tiny", usage=usage, timings=timings)
