"""A batch's lines in SQL: the only code that changes them.

    pending ──▶ taken ──▶ completed | failed | cancelled | expired
       ▲ │        │
       │ └────────┼─────▶ failed | cancelled | expired        never submitted
       └──────────┘ the queue could not take it: a new request id at the next try

A line is taken by writing a new request id into its row before the request is submitted under that id. Whoever finds a
taken line later asks the record what became of the id; if there is nothing, the request was never admitted, and may be
submitted under the same id: the primary keys of `requests` and `audit_events` let that succeed once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.errors import ServiceUnavailable, by_code
from tasks.ids import new_request_id
from tasks.schema import TERMINAL_KINDS, TERMINAL_STATES, audit_events, requests
from tasks.schema_batches import batch_items, batches

#: Lines that one transaction changes at most, so that it stays well within the database's time limit.
_SLICE = 5000
EndState = Literal["completed", "failed", "cancelled", "expired"]


@dataclass(frozen=True, slots=True)
class NewItem:
    """A valid line, to be stored."""

    line_number: int
    custom_id: str
    byte_offset: int
    byte_length: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A line with the id of the request that it is run as."""

    line_number: int
    byte_offset: int
    byte_length: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Ending:
    """How a line ended; `error` is a sealed error body, for a refusal that says more than its code."""

    item: Taken
    state: EndState
    code: str | None = None
    error: bytes | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the record says of a request id. `state` may be `vetoed`, which only the audit trail knows."""

    state: str
    code: str | None

    @property
    def ended(self) -> bool:
        """Tell whether nothing more will happen under this id."""
        return self.state in TERMINAL_STATES or self.state in TERMINAL_KINDS

    @property
    def to_retry(self) -> bool:
        """Tell whether the gateway could not take the request, so that it never ran."""
        return self.state == "failed" and issubclass(by_code(self.code), ServiceUnavailable)


def insert(connection: Connection, batch_id: str, new: Sequence[NewItem]) -> list[int]:
    """Store lines and return the numbers of those that were not, since an earlier line has their custom_id."""
    names = [item.custom_id for item in new]
    query = sa.select(batch_items.c.custom_id)
    query = query.where(batch_items.c.batch_id == batch_id, batch_items.c.custom_id.in_(names))
    seen, rows, duplicates = set(connection.execute(query).scalars()), [], []
    for item in new:
        if item.custom_id in seen:
            duplicates.append(item.line_number)
            continue
        seen.add(item.custom_id)
        rows.append(
            {
                "batch_id": batch_id,
                "line_number": item.line_number,
                "custom_id": item.custom_id,
                "byte_offset": item.byte_offset,
                "byte_length": item.byte_length,
                "state": "pending",
            }
        )
    if rows:
        connection.execute(sa.insert(batch_items), rows)
    return duplicates


def clear(connection: Connection, batch_id: str) -> bool:
    """Forget some lines of a batch. Returns whether there may be more, for another transaction."""
    query = sa.select(batch_items.c.line_number).where(batch_items.c.batch_id == batch_id).limit(_SLICE)
    mine = (batch_items.c.batch_id == batch_id, batch_items.c.line_number.in_(query.scalar_subquery()))
    return connection.execute(sa.delete(batch_items).where(*mine)).rowcount == _SLICE


def taken(connection: Connection, batch_id: str) -> list[Taken]:
    """Return the lines that have a request id and no end."""
    query = _columns().where(batch_items.c.batch_id == batch_id, batch_items.c.state == "taken")
    return [Taken(*row) for row in connection.execute(query.order_by(batch_items.c.line_number))]


def take(connection: Connection, batch_id: str, after: int, count: int) -> list[Taken]:
    """Give up to `count` pending lines after line `after` a request id."""
    query = _columns().where(
        batch_items.c.batch_id == batch_id, batch_items.c.state == "pending", batch_items.c.line_number > after
    )
    rows = connection.execute(query.order_by(batch_items.c.line_number).limit(count)).all()
    items = [Taken(row.line_number, row.byte_offset, row.byte_length, new_request_id()) for row in rows]
    for item in items:
        mine = (batch_items.c.batch_id == batch_id, batch_items.c.line_number == item.line_number)
        connection.execute(sa.update(batch_items).where(*mine).values(state="taken", request_id=item.request_id))
    return items


def give_back(connection: Connection, batch_id: str, items: Iterable[Taken]) -> None:
    """Make lines pending again whose request ids led to nothing."""
    for item in items:
        connection.execute(_update(batch_id, item).values(state="pending", request_id=None))


def end(connection: Connection, batch_id: str, endings: Collection[Ending]) -> None:
    """Record how taken lines ended, and count them."""
    for ending in endings:
        values = {"state": ending.state, "error_code": ending.code, "error": ending.error}
        connection.execute(_update(batch_id, ending.item).values(values))
    counts = {
        name: batches.c[name] + sum(ending.state == name for ending in endings) for name in ("completed", "failed")
    }
    connection.execute(sa.update(batches).where(batches.c.batch_id == batch_id).values(counts))


def end_pending(connection: Connection, batch_id: str, state: EndState, code: str) -> bool:
    """End some lines that were never taken. Returns whether there may be more, for another transaction."""
    pending = (batch_items.c.batch_id == batch_id, batch_items.c.state == "pending")
    query = sa.select(batch_items.c.line_number).where(*pending).limit(_SLICE)
    some = sa.update(batch_items).where(*pending, batch_items.c.line_number.in_(query.scalar_subquery()))
    ended = connection.execute(some.values(state=state, error_code=code)).rowcount
    if state == "failed":
        statement = sa.update(batches).where(batches.c.batch_id == batch_id)
        connection.execute(statement.values(failed=batches.c.failed + ended))
    return ended == _SLICE


def page(connection: Connection, batch_id: str, after: int, limit: int) -> list[Row[Any]]:
    """Return up to `limit` lines after line `after`, in order."""
    query = sa.select(batch_items).where(batch_items.c.batch_id == batch_id, batch_items.c.line_number > after)
    return list(connection.execute(query.order_by(batch_items.c.line_number).limit(limit)))


def counts(connection: Connection, batch_id: str) -> dict[str, int]:
    """Return how many lines are in each state."""
    query = sa.select(batch_items.c.state, sa.func.count()).where(batch_items.c.batch_id == batch_id)
    return {row[0]: row[1] for row in connection.execute(query.group_by(batch_items.c.state))}


def outcomes(connection: Connection, request_ids: Collection[str]) -> dict[str, Outcome]:
    """Return what is recorded of these requests; of one that was never submitted, nothing."""
    query = sa.select(requests.c.request_id, requests.c.state, requests.c.error_code)
    rows = connection.execute(query.where(requests.c.request_id.in_(request_ids)))
    found = {row.request_id: Outcome(row.state, row.error_code) for row in rows}
    missing = [request_id for request_id in request_ids if request_id not in found]
    if missing:
        # A refusal leaves no row in `requests`.
        refused = sa.select(audit_events.c.request_id, audit_events.c.kind, audit_events.c.code).where(
            audit_events.c.request_id.in_(missing), audit_events.c.kind.in_(TERMINAL_KINDS)
        )
        found |= {row.request_id: Outcome(row.kind, row.code) for row in connection.execute(refused)}
    return found


def _columns() -> sa.Select[Any]:
    columns = (batch_items.c.line_number, batch_items.c.byte_offset, batch_items.c.byte_length)
    return sa.select(*columns, batch_items.c.request_id)


def _update(batch_id: str, item: Taken) -> sa.Update:
    return sa.update(batch_items).where(
        batch_items.c.batch_id == batch_id,
        batch_items.c.line_number == item.line_number,
        batch_items.c.state == "taken",
        batch_items.c.request_id == item.request_id,
    )
