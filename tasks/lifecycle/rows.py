"""What the steps of a request's life share: an attempt, and the row as it is while nobody else can change it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.audit.events import Subject
from tasks.schema import requests

SUBJECT = (requests.c.request_id, requests.c.organization, requests.c.api_key_id, requests.c.agent_name)
_PROGRESS = ("state", "epoch", "attempt", "excused", "error_code", "worker", "cancel_requested_at", "deadline")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One worker's right to run a request, until the row carries another epoch or attempt."""

    subject: Subject
    epoch: int
    number: int
    worker: str | None = None
    deadline: datetime | None = None


def locked(connection: Connection, request_id: str, *more: sa.ColumnElement[Any]) -> Row[Any] | None:
    """Return how far the request is, with `more` columns; until the transaction ends, nobody else changes the row.

    SQLite has one writer at a time, so there the transaction itself is the lock.
    """
    answered = requests.c.result.is_not(None).label("answered")
    columns: list[Any] = [*SUBJECT, *(requests.c[name] for name in _PROGRESS), answered, *more]
    query = sa.select(*columns)
    return connection.execute(query.where(requests.c.request_id == request_id).with_for_update()).one_or_none()


def subject_of(row: Row[Any]) -> Subject:
    """Return whom the row's events are about."""
    return Subject(row.request_id, row.organization, row.api_key_id, row.agent_name)


def last_attempt(row: Row[Any]) -> Attempt:
    """Return the attempt that the row carries: number 0 before the first one."""
    return Attempt(subject_of(row), row.epoch, row.attempt, row.worker, row.deadline)


def carries(row: Row[Any], attempt: Attempt) -> bool:
    """Tell whether the row still carries the attempt's epoch and number."""
    return (row.epoch, row.attempt) == (attempt.epoch, attempt.number)


def is_late(row: Row[Any], at: datetime) -> bool:
    """Tell whether the request had to be answered before `at`."""
    return row.deadline is not None and row.deadline <= at
