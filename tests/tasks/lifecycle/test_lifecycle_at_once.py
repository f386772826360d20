"""Several who act at the same instant, on both databases: threads, and on PostgreSQL transactions held open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tasks import lifecycle
from tasks.lifecycle import FIRST_EPOCH, Attempt, NotStarted
from tasks.schema import TERMINAL_KINDS
from tests.services import wait_until
from tests.tasks.lifecycle.admitted import WORKERS, End, Request, answer


def test_starts_at_once(engine: Engine) -> None:
    """Eight workers that get the same message at once: three begin, with numbers of their own; then it is dead."""
    request = Request(engine)
    barrier = threading.Barrier(8)

    def start(number: int) -> Attempt | NotStarted:
        barrier.wait(30)
        return request.start(f"gpu-{number}")

    with ThreadPoolExecutor(8) as threads:
        outcomes = list(threads.map(start, range(8)))
    begun = [outcome for outcome in outcomes if isinstance(outcome, Attempt)]
    assert sorted(attempt.number for attempt in begun) == [1, 2, 3]
    refused = [outcome for outcome in outcomes if isinstance(outcome, NotStarted)]
    assert refused == [NotStarted("dead", 3, "attempts_exhausted")] * 5
    assert request.kinds.count("dead") == 1


def test_ends_at_once(engine: Engine) -> None:
    """Ten different ends of one attempt at once: one is recorded, and exactly who said that one hears True."""
    request = Request(engine)
    attempt = request.begun()
    barrier = threading.Barrier(8)
    ends: list[End] = ["completed", "failed", "cancelled", "expired"] * 2

    def finish(state: End) -> bool:
        barrier.wait(30)
        return request.answer(attempt) if state == "completed" else request.finish(attempt, state)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(finish, ends))
    state = request.row.state
    assert [kind for kind in request.kinds if kind in TERMINAL_KINDS] == [state]
    assert answers == [end == state for end in ends]


@pytest.mark.parametrize("round_number", range(3))
def test_cancelling_while_a_worker_takes_it(engine: Engine, round_number: int) -> None:
    """Either it ends before it begins, or it has begun and is marked: it never runs on unmarked."""
    request = Request(engine)
    barrier = threading.Barrier(3)

    def cancel() -> None:
        barrier.wait(30)
        request.cancel()

    def start() -> Attempt | NotStarted:
        barrier.wait(30)
        return request.start()

    with ThreadPoolExecutor(3) as threads:
        cancelling = [threads.submit(cancel) for _ in range(2)]
        started = threads.submit(start).result(30)
        for future in cancelling:
            future.result(30)
    row = request.row
    if isinstance(started, NotStarted):
        assert started == NotStarted("cancelled", 0, "cancelled")
        assert request.kinds == ["received", "admitted", "cancelled"]
    else:
        assert (row.state, row.cancel_requested_at is not None) == ("running", True)
        assert request.kinds == ["received", "admitted", "started"]


@pytest.mark.parametrize("round_number", range(3))
def test_cancelling_while_it_is_answered(engine: Engine, round_number: int) -> None:
    """The answer stands, whatever came first; who cancelled saw the request running, or completed."""
    request = Request(engine)
    attempt = request.begun()
    barrier = threading.Barrier(3)

    def cancel() -> sa.Row[Any] | None:
        barrier.wait(30)
        return request.cancel()

    def complete() -> bool:
        barrier.wait(30)
        return request.answer(attempt)

    with ThreadPoolExecutor(3) as threads:
        cancelling = [threads.submit(cancel) for _ in range(2)]
        assert threads.submit(complete).result(30)
        seen = [future.result(30) for future in cancelling]
    assert request.row.state == "completed"
    assert request.kinds == ["received", "admitted", "started", "completed"]
    assert {before.state for before in seen if before is not None} <= {"running", "completed"}


def _waiting_for_a_lock(engine: Engine) -> Callable[[], bool]:
    query = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )

    def waits() -> bool:
        with engine.connect() as connection:
            return bool(connection.execute(query).scalar_one())

    return waits


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_the_last_attempt_answers_while_it_is_given_up(engine: Engine) -> None:
    """A second delivery finds all attempts used and waits for the row, in which the third attempt just records its
    answer: then the request is completed, and nobody may be told otherwise.
    """
    request = Request(engine)
    attempt = [request.begun(worker) for worker in WORKERS][-1]
    with ThreadPoolExecutor(1) as threads:
        with engine.begin() as connection:
            assert lifecycle.answer(connection, attempt, answer("one"), b"one")
            starting: Future[Attempt | NotStarted] = threads.submit(request.start, "gpu-9")
            wait_until(_waiting_for_a_lock(engine), 10, "the second delivery to wait for the row")
        outcome = starting.result(30)
    assert request.row.state == "completed"
    assert request.kinds.count("completed") == 1
    assert "failed" not in request.kinds
    assert outcome == NotStarted("completed", 3, None, answered=True)


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_request_that_ends_while_it_is_cancelled_is_not_marked(engine: Engine) -> None:
    """Who cancels waits for the row, in which its worker just records the answer, and finds it completed."""
    request = Request(engine)
    attempt = request.begun()
    with ThreadPoolExecutor(1) as threads:
        with engine.begin() as connection:
            assert lifecycle.answer(connection, attempt, answer("one"), b"one")
            cancelling = threads.submit(request.cancel)
            wait_until(_waiting_for_a_lock(engine), 10, "the cancelling to wait for the row")
        before = cancelling.result(30)
    assert before is not None
    assert before.state == "completed"
    assert (request.row.state, request.row.cancel_requested_at) == ("completed", None)


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_request_that_is_taken_while_it_is_cancelled_is_marked(engine: Engine) -> None:
    """Who cancels waits for the row, in which a worker just begins it: so the worker has to end it."""
    request = Request(engine)
    with ThreadPoolExecutor(1) as threads:
        with engine.begin() as connection:
            assert isinstance(lifecycle.start(connection, request.id, FIRST_EPOCH, "gpu-1", 3), Attempt)
            cancelling = threads.submit(request.cancel)
            wait_until(_waiting_for_a_lock(engine), 10, "the cancelling to wait for the row")
        cancelling.result(30)
    assert (request.row.state, request.row.cancel_requested_at is not None) == ("running", True)
    assert request.kinds == ["received", "admitted", "started"]
