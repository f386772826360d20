"""What SQL holds of the requests, read with plain SQL and without the gateway's code."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime

import sqlalchemy as sa

OPEN_STATES = ("queued", "running")
_ROWS = "SELECT request_id, state, attempt, finished_at FROM requests"
_EVENTS = "SELECT request_id, kind, attempt, epoch, occurred_at, worker, code FROM audit_events ORDER BY occurred_at"


@dataclass(frozen=True, slots=True)
class Event:
    """One audit event. `at` is of the wall clock, in seconds."""

    kind: str
    attempt: int
    epoch: int
    at: float
    worker: str | None
    code: str | None


@dataclass(frozen=True, slots=True)
class Row:
    """A request's row; `finished` tells whether it has a time of its end."""

    state: str
    attempt: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Record:
    """Each request's row, and its events in order of time."""

    rows: dict[str, Row] = field(default_factory=dict)
    events: dict[str, list[Event]] = field(default_factory=lambda: defaultdict(list))

    def starts(self, request_id: str) -> list[Event]:
        """Return the beginnings of the request's attempts."""
        return [event for event in self.events[request_id] if event.kind == "started"]

    @property
    def all_starts(self) -> list[Event]:
        """Return the beginnings of all attempts, in order of time."""
        found = [event for events in self.events.values() for event in events if event.kind == "started"]
        return sorted(found, key=lambda event: event.at)


def read(database_url: str) -> Record:
    """Return what SQL holds now."""
    record = Record()
    engine = sa.create_engine(database_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        for request_id, state, attempt, finished_at in connection.execute(sa.text(_ROWS)):
            record.rows[request_id] = Row(state, attempt, finished_at is not None)
        for request_id, kind, attempt, epoch, at, worker, code in connection.execute(sa.text(_EVENTS)):
            record.events[request_id].append(Event(kind, attempt, epoch, seconds(at), worker, code))
    engine.dispose()
    return record


def seconds(at: datetime | str) -> float:
    """Return an instant of the record in seconds. Without SQLAlchemy's types SQLite gives text, in UTC."""
    moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
