"""A gateway and its workers in a few lines: requests are admitted in SQL as the pipeline does it, and ended on demand.

What was run is known from the record alone, so that it can be asked after any number of kills.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from pydantic_core import from_json, to_json
from sqlalchemy.engine import Connection, Row

from gateway_app.batches.files import Files
from gateway_app.batches.ports import Limits, Services
from gateway_app.governance.api_keys import Caller
from tasks import lifecycle
from tasks.audit.events import Subject
from tasks.crypto import KeyWrapper, seal, unseal
from tasks.db import Database
from tasks.errors import GatewayError, ServiceUnavailable
from tasks.lifecycle import Admission, Attempt, NotStarted
from tasks.schema import requests

URL: Final = "/v1/chat/completions"
#: Returns the error that a body is refused with, if it is.
Judge = Callable[[Mapping[str, Any]], GatewayError | None]


class FakeGateway:
    """Admits, runs, cancels and renders requests."""

    def __init__(self, database: Database, keys: KeyWrapper, judge: Judge = lambda _body: None) -> None:
        self.database = database
        self.keys = keys
        self.judge = judge
        self.submitted: Counter[str] = Counter()
        self.deadlines: set[datetime] = set()
        #: Requests that were told to stop while they ran; the workers of a test end them when it likes.
        self.stopping: list[str] = []

    def submit(self, caller: Caller, url: str, body: Mapping[str, Any], *, request_id: str, deadline: datetime) -> None:
        """Do as `gateway_app.pipeline` does."""
        assert url == URL
        self.deadlines.add(deadline)
        self.submitted[request_id] += 1
        subject = Subject(request_id, caller.organization, caller.key_id, "fake")
        refusal = self.judge(body)
        if refusal is not None:
            refusal.request_id = request_id
            self.database.write(lambda connection: lifecycle.refuse(connection, subject, "failed", refusal.code, {}))
            raise refusal
        self.admit(subject, body, deadline)

    def admit(self, subject: Subject, body: Mapping[str, Any], deadline: datetime) -> None:
        """Store the request as queued."""
        data_key, wrapped_key = self.keys.new_key(subject.request_id)
        admission = Admission(
            subject=subject,
            decision={},
            static_profile_hash="0" * 64,
            data_key=wrapped_key,
            payload=seal(data_key, to_json(body), f"payload:{subject.request_id}"),
            columns={"api": "chat", "priority": "low", "deadline": deadline},
        )
        self.database.write(lambda connection: lifecycle.admit(connection, admission))

    def render(self, row: Row[Any]) -> dict[str, Any]:
        """Return an answer that tells what was asked."""
        assert row.state == "completed"
        return {"echo": self.body(row), "usage": {"prompt_tokens": 10, "completion_tokens": 2}}

    def body(self, row: Row[Any]) -> dict[str, Any]:
        """Return a request's body."""
        data_key = self.keys.unwrap(row.data_key, row.request_id)
        body: dict[str, Any] = from_json(unseal(data_key, row.payload, f"payload:{row.request_id}"))
        return body

    def cancel(self, request_id: str, organization: str) -> None:
        """Do as `gateway_app.cancelling` does, without waiting."""
        before = self.database.write(lambda connection: lifecycle.cancel(connection, request_id, organization))
        assert before is not None
        if before.state == "running":
            self.stopping.append(request_id)

    def rows(self, *states: str) -> list[Row[Any]]:
        """Return the requests that are in one of these states."""
        query = sa.select(requests).where(requests.c.state.in_(states)).order_by(requests.c.request_id)
        return self.database.read(lambda connection: list(connection.execute(query)))

    def start(self, row: Row[Any]) -> None:
        """Let a worker begin with a request."""
        self.database.write(lambda connection: lifecycle.start(connection, row.request_id, row.epoch, "worker", 3))

    def end(self, row: Row[Any], state: Any = "completed", code: str | None = None) -> None:
        """Let a request end."""
        self.database.write(lambda connection: _end(connection, row, state, code))

    def work(self, chance: random.Random | None = None) -> int:
        """End all waiting requests, or some by `chance`; return how many."""
        waiting = [row for row in self.rows("queued", "running") if chance is None or chance.random() < 0.5]

        def complete(connection: Connection) -> None:
            for row in waiting:
                _end(connection, row, "completed", None)

        if waiting:
            self.database.write(complete)
        return len(waiting)

    def services(self, files: Files, database: Database | None = None, **limits: Any) -> Services:
        """Return what a driver needs, over this gateway."""
        return Services(
            database=database or self.database,
            files=files,
            keys=self.keys,
            submit=self.submit,
            render=self.render,
            cancel=self.cancel,
            limits=Limits(**{"poll_s": 0.001, **limits}),
        )


def _end(connection: Connection, row: Row[Any], state: Any, code: str | None) -> None:
    subject = Subject(row.request_id, row.organization, row.api_key_id, row.agent_name)
    attempt: Attempt | NotStarted = Attempt(subject, row.epoch, row.attempt, row.worker)
    if row.state == "queued":
        attempt = lifecycle.start(connection, row.request_id, row.epoch, "worker", 3)
    if isinstance(attempt, Attempt):
        lifecycle.finish(connection, attempt, state, code=code)


def line(custom_id: str, /, **changes: Any) -> dict[str, Any]:
    """Return a request of a batch, whose body names its custom_id."""
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": {"name": custom_id}, **changes}


def jsonl(*lines: Any) -> bytes:
    """Return lines as a file."""
    return b"".join(to_json(item) + b"\n" for item in lines)


def store(files: Files, database: Database, caller: Caller, content: bytes) -> str:
    """Store a batch's input and return its id."""
    writer = files.open(caller, "input.jsonl")
    writer.write(content)
    writer.flush()
    database.write(lambda connection: writer.finish(connection, "batch", timedelta(days=30)))
    return writer.file_id


class Busy:
    """Refuses as a full queue does, `count` times."""

    def __init__(self, count: int, error: type[ServiceUnavailable]) -> None:
        self.left = count
        self.error = error

    def __call__(self, _body: Mapping[str, Any]) -> GatewayError | None:
        """Return the refusal, while there are some left."""
        self.left -= 1
        return self.error() if self.left >= 0 else None
