"""One admitted request, and what its workers, clients and housekeepers may do to it, each in a transaction of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from tasks import lifecycle
from tasks.audit.events import Subject
from tasks.idempotency import Idempotency
from tasks.ids import new_request_id
from tasks.job import Piece, Result, Timings, Usage
from tasks.lifecycle import FIRST_EPOCH, Attempt, GivenBack, NotStarted, Republished
from tasks.schema import KINDS, audit_events, requests

MAX_EPOCHS = 5
WORKERS = ("gpu-1", "gpu-2", "gpu-3")
End = Literal["completed", "failed", "cancelled", "expired", "dead"]
Said = Literal["completed", "cancelled", "expired"]


def new_admission(
    organization: str = "acme", *, idempotency: Idempotency | None = None, **columns: Any
) -> lifecycle.Admission:
    """Return a request that governance allows."""
    return lifecycle.Admission(
        subject=Subject(new_request_id(), organization, "key_1", "incident-responder"),
        decision={"policy": "default_local_first", "project_id": "proj_1"},
        static_profile_hash="ab" * 32,
        data_key=b"wrapped",
        payload=b"sealed payload",
        columns={"api": "tasks", "priority": "normal", "deadline": None, **columns},
        idempotency=idempotency,
        message=b"sealed message",
        prompt_tokens=700,
    )


def idempotency(key: str, body: str) -> Idempotency:
    """Return what is remembered of a key and a body."""
    return Idempotency(key.encode() * 32, body.encode() * 32)


def answer(text: str, state: str = "completed") -> Result:
    """Return a result with this text, whole or as far as it came."""
    return Result(
        pieces=(Piece(text=text),),
        finish_reasons=("stop",) if state == "completed" else (),
        model="tiny",
        usage=Usage(prompt_tokens=700, cached_tokens=640, output_tokens=5),
        timings=Timings(queued_ms=1.5, prefill_ms=None, first_token_ms=30.5, total_ms=99.75),
    )


def row_of(connection: Connection, request_id: str) -> sa.Row[Any]:
    """Return a request's row."""
    return connection.execute(sa.select(requests).where(requests.c.request_id == request_id)).one()


def events_of(connection: Connection, request_id: str) -> list[sa.Row[Any]]:
    """Return a request's events, in the order in which they can happen."""
    rows = connection.execute(sa.select(audit_events).where(audit_events.c.request_id == request_id))
    return sorted(rows, key=lambda row: (row.attempt, row.epoch, KINDS.index(row.kind)))


class Request:
    """One admitted request."""

    def __init__(self, engine: Engine, **columns: Any) -> None:
        self.engine = engine
        admission = new_admission(**columns)
        self.subject = admission.subject
        self.id = self.subject.request_id
        self.do(lambda connection: lifecycle.admit(connection, admission))

    def do(self, work: Callable[[Connection], Any]) -> Any:
        """Run a write as the writer thread does."""
        with self.engine.execution_options(immediate=True).begin() as connection:
            return work(connection)

    def start(self, worker: str = "gpu-1", epoch: int = FIRST_EPOCH, most: int = 3) -> Attempt | NotStarted:
        """Begin an attempt."""
        started: Attempt | NotStarted = self.do(
            lambda connection: lifecycle.start(connection, self.id, epoch, worker, most)
        )
        return started

    def begun(self, worker: str = "gpu-1", epoch: int = FIRST_EPOCH) -> Attempt:
        """Begin an attempt that is allowed."""
        started = self.start(worker, epoch)
        assert isinstance(started, Attempt)
        return started

    def answer(self, attempt: Attempt, text: str = "one", state: Said = "completed") -> bool:
        """Record an answer."""
        return bool(self.do(lambda c: lifecycle.answer(c, attempt, answer(text, state), text.encode(), state)))

    def finish(self, attempt: Attempt, state: End, code: str | None = None) -> bool:
        """Record another end."""
        return bool(self.do(lambda connection: lifecycle.finish(connection, attempt, state, code=code)))

    def give_back(
        self, attempt: Attempt, code: str = "engine_failed", *, delay_s: float = 0.0, most: int | None = 3
    ) -> GivenBack:
        """Record that an attempt ended without an answer."""
        given: GivenBack = self.do(lambda c: lifecycle.give_back(c, attempt, code, delay_s=delay_s, max_attempts=most))
        return given

    def republish(self, epoch: int = FIRST_EPOCH, attempt: int = 0) -> Republished | None:
        """Publish again what Redis lost."""
        again: Republished | None = self.do(
            lambda c: lifecycle.republish(c, self.id, epoch, attempt, max_epochs=MAX_EPOCHS)
        )
        return again

    def cancel(self, organization: str = "acme") -> sa.Row[Any] | None:
        """Ask for its end; return the row as it was before."""
        row: sa.Row[Any] | None = self.do(lambda connection: lifecycle.cancel(connection, self.id, organization))
        return row

    def expire(self) -> None:
        """Look whether anybody took it in time."""
        self.do(lambda connection: lifecycle.expire(connection, self.id))

    def set(self, **columns: Any) -> None:
        """Change the row behind everybody's back, as time would."""
        self.do(lambda c: c.execute(sa.update(requests).where(requests.c.request_id == self.id).values(columns)))

    @property
    def row(self) -> sa.Row[Any]:
        """Return the request's row."""
        return self.do(lambda connection: row_of(connection, self.id))  # type: ignore[no-any-return]

    @property
    def events(self) -> list[sa.Row[Any]]:
        """Return what was recorded, in order."""
        return self.do(lambda connection: events_of(connection, self.id))  # type: ignore[no-any-return]

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of what was recorded, in order."""
        return [event.kind for event in self.events]
