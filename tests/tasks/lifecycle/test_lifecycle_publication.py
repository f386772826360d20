"""What the housekeeper does: publishing again what Redis lost, and ending what nobody took in time."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tasks import lifecycle
from tasks.db import now
from tasks.lifecycle import FIRST_EPOCH, NotStarted, Republished
from tasks.schema import requests
from tests.services import wait_until
from tests.tasks.lifecycle.admitted import MAX_EPOCHS, Request


def test_a_lost_message_is_published_under_the_next_epoch(engine: Engine) -> None:
    """With all that a message needs; what turns up of the old epoch leads nowhere."""
    request = Request(engine, priority="high")
    before = request.row.published_at
    again = request.republish()
    row = request.row
    assert again == Republished(
        request_id=request.id,
        epoch=FIRST_EPOCH + 1,
        organization="acme",
        static_profile_hash="ab" * 32,
        prompt_tokens=700,
        priority="high",
        data_key=b"wrapped",
        message=b"sealed message",
        published_at=row.published_at,
    )
    assert row.published_at > before
    assert (row.state, row.epoch, row.attempt, row.excused) == ("queued", FIRST_EPOCH + 1, 0, 0)
    said = request.events[-1]
    assert (said.kind, said.code, said.attempt, said.epoch) == ("requeued", "queue_lost", 0, FIRST_EPOCH + 1)
    assert request.start() == NotStarted("queued", 0)
    assert request.answer(request.begun(epoch=FIRST_EPOCH + 1))


def test_only_what_was_looked_at_is_published_again(engine: Engine) -> None:
    """Whoever comes second, or saw the request before its next attempt, or after its end, changes nothing."""
    request = Request(engine)
    assert request.republish() is not None
    assert request.republish() is None
    attempt = request.begun(epoch=FIRST_EPOCH + 1)
    assert request.republish(FIRST_EPOCH + 1, 0) is None
    assert request.row.state == "running"
    assert request.answer(attempt)
    assert request.republish(FIRST_EPOCH + 1, 1) is None
    assert request.kinds == ["received", "admitted", "requeued", "started", "completed"]


def test_a_running_request_that_redis_lost(engine: Engine) -> None:
    """Who runs it is fenced off, and that attempt is excused: neither it nor the request is to blame."""
    request = Request(engine)
    lost = request.begun()
    assert request.republish(attempt=1) is not None
    assert not request.answer(lost)
    row = request.row
    assert (row.state, row.attempt, row.excused) == ("queued", 1, 1)
    assert [request.begun(epoch=FIRST_EPOCH + 1).number for _ in range(3)] == [2, 3, 4]
    assert request.start(epoch=FIRST_EPOCH + 1) == NotStarted("dead", 4, "attempts_exhausted")


def test_a_request_that_waits_after_a_failure_is_published_at_once(engine: Engine) -> None:
    """Where Redis lost it, how long it was to wait is lost too."""
    request = Request(engine)
    assert request.give_back(request.begun(), delay_s=60) == "queued"
    assert request.republish(attempt=1) is not None
    assert (request.row.not_before, request.row.excused) == (None, 0)
    assert request.kinds == ["received", "admitted", "started", "requeued", "requeued"]


def test_a_request_is_not_published_for_ever(engine: Engine) -> None:
    """After so many losses it is dead."""
    request = Request(engine)
    for epoch in range(FIRST_EPOCH, MAX_EPOCHS):
        assert request.republish(epoch) is not None
    assert request.republish(MAX_EPOCHS) is None
    row = request.row
    assert (row.state, row.error_code, row.epoch, row.message) == ("dead", "queue_lost", MAX_EPOCHS, None)
    assert request.kinds == ["received", "admitted", *["requeued"] * (MAX_EPOCHS - 1), "dead"]


@pytest.mark.parametrize("missing", ["message", "data_key", "prompt_tokens"])
def test_a_request_whose_message_cannot_be_made_again(engine: Engine, missing: str) -> None:
    """One of a release that kept no messages: lost is lost, and said so."""
    request = Request(engine)
    request.set(**{missing: None})
    assert request.republish() is None
    assert (request.row.state, request.row.error_code) == ("dead", "queue_lost")


@pytest.mark.parametrize(("end", "columns"), [("cancelled", {"cancel_requested_at": now()}), ("expired", {})])
def test_what_nobody_wants_is_not_published_again(engine: Engine, end: str, columns: dict[str, Any]) -> None:
    """It ends, whether its worker is still there or not."""
    request = Request(engine, deadline=now() + timedelta(hours=1))
    attempt = request.begun()
    request.set(**(columns or {"deadline": now() - timedelta(seconds=1)}))
    assert request.republish(attempt=1) is None
    assert (request.row.state, request.row.epoch, request.row.message) == (end, FIRST_EPOCH, None)
    assert not request.answer(attempt)


def test_overdue_requests_expire_in_portions(engine: Engine) -> None:
    """Those that waited too long, the longest overdue first; those that run, have time or no deadline stay."""
    start = now()
    overdue = [Request(engine, deadline=start - timedelta(minutes=minutes)) for minutes in (3, 1, 2)]
    kept = [Request(engine), Request(engine, deadline=start + timedelta(hours=1))]
    running = Request(engine, deadline=start + timedelta(hours=1))
    running.begun()
    running.set(deadline=start - timedelta(minutes=9))

    def expire(limit: int) -> list[str]:
        ids: list[str] = overdue[0].do(lambda c: lifecycle.expire_overdue(c, limit))
        return ids

    assert expire(2) == [overdue[0].id, overdue[2].id]
    assert expire(2) == [overdue[1].id]
    assert expire(2) == []
    for request in overdue:
        assert (request.row.state, request.row.error_code, request.row.message) == ("expired", "expired", None)
        assert request.kinds == ["received", "admitted", "expired"]
    assert [request.row.state for request in (*kept, running)] == ["queued", "queued", "running"]


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_what_a_worker_is_just_beginning_is_left_to_it(engine: Engine) -> None:
    """The housekeeper waits for nobody: it takes the next one."""
    held, other = (Request(engine, deadline=now() + timedelta(seconds=0.3)) for _ in range(2))
    with engine.begin() as connection:
        assert isinstance(lifecycle.start(connection, held.id, FIRST_EPOCH, "gpu-1", 3), lifecycle.Attempt)
        wait_until(lambda: now() > other.row.deadline, 10, "the deadline")
        assert other.id in other.do(lambda c: lifecycle.expire_overdue(c, 10))
    assert (held.row.state, other.row.state) == ("running", "expired")


def test_the_housekeepers_questions_have_indices(engine: Engine) -> None:
    """Neither a walk over what is open nor a look for what is overdue reads what has ended."""
    walk = sa.select(requests.c.request_id).where(requests.c.finished_at.is_(None), requests.c.request_id > "gw_")
    due = sa.select(requests.c.request_id).where(
        requests.c.finished_at.is_(None), requests.c.deadline.is_not(None), requests.c.deadline <= now()
    )
    for query, index, order in ((walk, "requests_open", "request_id"), (due, "requests_due", "deadline")):
        ordered = query.order_by(requests.c[order]).limit(100)
        text = str(ordered.compile(engine, compile_kwargs={"literal_binds": True}))
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                plan = [str(row) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
                assert any(f"INDEX {index}" in line for line in plan), plan
                continue
            # Small tables are read from end to end, or sorted, whatever indices they have, unless that is forbidden.
            for way in ("seqscan", "bitmapscan", "sort"):
                connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
            plan = [str(row) for row in connection.exec_driver_sql(f"EXPLAIN {text.replace('%', '%%')}")]
            assert any("Index" in line for line in plan), plan
            assert not any("Seq Scan" in line or "-> Sort" in " ".join(line.split()) for line in plan), plan
