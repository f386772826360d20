"""A stand-in for a worker: a test says what becomes of a task, and when."""

from __future__ import annotations

from typing import Any

import redis
from flask.testing import FlaskClient

from tasks import lifecycle, requests_read
from tasks.crypto import KeyWrapper, seal
from tasks.db import Database
from tasks.job import Piece, Result, Timings, Usage
from tasks.lifecycle import Attempt
from tasks.settings import settings
from tasks.stream import FIELD, Frame, stream_key

TASK = {"agent": "incident-responder", "directive": "What now?"}
PREFIX = "metaqore:"


def result(*texts: str) -> Result:
    """Return an answer that came in these pieces."""
    return Result(
        pieces=tuple(Piece(text=text) for text in texts),
        finish_reasons=("stop",),
        model="tiny",
        usage=Usage(prompt_tokens=9, cached_tokens=0, output_tokens=len(texts)),
        timings=Timings(queued_ms=1, total_ms=2),
    )


class PlayedWorker:
    """Submits tasks through `client`, and does with them what the test says."""

    def __init__(self, client: FlaskClient) -> None:
        self.client = client
        self.database = Database(settings().database)
        self.keys = KeyWrapper(settings().secrets.keys("master_key"))
        self.redis = redis.Redis.from_url(settings().gateway.request_queue_url)
        self._data_keys: dict[str, bytes] = {}

    def submit(self) -> str:
        """Return a new task's id."""
        accepted: dict[str, Any] = self.client.post("/v1/tasks", json=TASK).get_json()
        request_id: str = accepted["id"]
        return request_id

    def start(self, request_id: str) -> Attempt:
        """Begin an attempt."""
        started = self.database.write(lambda connection: lifecycle.start(connection, request_id, 1, "test", 3))
        assert isinstance(started, Attempt)
        return started

    def answer(self, request_id: str, attempt: Attempt, answer: Result) -> None:
        """Record the answer."""
        sealed = seal(self._data_key(request_id), answer.model_dump_json().encode(), f"result:{request_id}")
        assert self.database.write(lambda connection: lifecycle.answer(connection, attempt, answer, sealed))

    def fail(self, attempt: Attempt) -> None:
        """Record that there is no answer."""
        self.database.write(lambda connection: lifecycle.finish(connection, attempt, "failed", code="engine_failed"))

    def send(self, request_id: str, *frames: Frame) -> None:
        """Write frames to the task's stream."""
        with self.redis.pipeline(transaction=False) as pipe:
            for frame in frames:
                sealed = frame.seal(self._data_key(request_id), request_id)
                pipe.xadd(stream_key(PREFIX, request_id), {FIELD: sealed}, id=str(frame.cursor))
            pipe.execute()

    def close(self) -> None:
        """Let go of the services."""
        self.database.close()
        self.redis.close()

    def _data_key(self, request_id: str) -> bytes:
        if request_id not in self._data_keys:
            row = self.database.read(lambda connection: requests_read.find(connection, request_id, "default"))
            assert row is not None
            self._data_keys[request_id] = self.keys.unwrap(row.data_key, request_id)
        return self._data_keys[request_id]
