"""Cancelling and deadlines, one by one, on both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy.engine import Engine

from tasks import lifecycle, requests_read
from tasks.audit.events import ciphertext_hash
from tasks.db import now
from tasks.ids import new_request_id
from tasks.lifecycle import FIRST_EPOCH, NotStarted
from tests.tasks.lifecycle.admitted import Request


def test_cancelling_a_queued_request_ends_it(engine: Engine) -> None:
    """At once, and once; whoever gets its message later is told so."""
    request = Request(engine)
    before = request.cancel()
    assert before is not None
    assert before.state == "queued"
    assert (request.row.state, request.row.error_code, request.row.cancel_requested_at) == (
        "cancelled",
        "cancelled",
        None,
    )
    again = request.cancel()
    assert again is not None
    assert again.state == "cancelled"
    assert request.start() == NotStarted("cancelled", 0, "cancelled")
    assert request.kinds == ["received", "admitted", "cancelled"]


def test_cancelling_a_running_request_is_its_workers_to_do(engine: Engine) -> None:
    """It is marked, once; its worker finds that, and records what was said, which then ends it."""
    request = Request(engine)
    attempt = request.begun()
    request.cancel()
    marked_at = request.row.cancel_requested_at
    assert (request.row.state, marked_at is not None) == ("running", True)
    request.cancel()
    assert request.row.cancel_requested_at == marked_at
    others = [Request(engine), Request(engine)]
    others[0].begun()
    ids = [request.id, *(other.id for other in others)]
    assert request.do(lambda connection: requests_read.to_stop(connection, ids)) == [request.id]
    assert request.answer(attempt, "half", "cancelled")
    row = request.row
    assert (row.state, row.error_code, row.result) == ("cancelled", "cancelled", b"half")
    ended = request.events[-1]
    assert (ended.kind, ended.output_tokens, ended.model) == ("cancelled", 5, "tiny")
    assert ended.payload_sha256 == ciphertext_hash(b"half")
    assert request.start() == NotStarted("cancelled", 1, "cancelled", answered=True)


def test_an_answer_that_came_before_the_worker_heard_of_the_cancelling(engine: Engine) -> None:
    """It counts: the request is completed, and says so to whoever cancelled it."""
    request = Request(engine)
    attempt = request.begun()
    request.cancel()
    assert request.answer(attempt)
    after = request.cancel()
    assert after is not None
    assert (after.state, request.row.state) == ("completed", "completed")
    assert request.kinds == ["received", "admitted", "started", "completed"]


def test_a_worker_that_died_before_it_could_cancel(engine: Engine) -> None:
    """The next one that gets the message ends the request without beginning it; the lost one changes nothing."""
    request = Request(engine)
    lost = request.begun("gpu-1")
    request.cancel()
    for _ in range(2):
        assert request.start("gpu-2") == NotStarted("cancelled", 1, "cancelled")
    assert not request.answer(lost, "late")
    assert request.row.worker == "gpu-1"
    assert request.kinds == ["received", "admitted", "started", "cancelled"]


@pytest.mark.parametrize("epoch", [FIRST_EPOCH - 1, FIRST_EPOCH + 1])
def test_a_message_of_another_epoch_ends_nothing(engine: Engine, epoch: int) -> None:
    """Neither a cancelled request nor one that is too late: that is for the epoch that counts."""
    request = Request(engine, deadline=now() - timedelta(seconds=1))
    assert request.start(epoch=epoch) == NotStarted("queued", 0)
    assert request.kinds == ["received", "admitted"]


def test_of_other_organizations_there_is_nothing_to_cancel(engine: Engine) -> None:
    """The answer is the same as for a request that never was."""
    request = Request(engine)
    assert request.cancel("globex") is None
    request.begun()
    assert request.cancel("globex") is None
    assert (request.row.state, request.row.cancel_requested_at) == ("running", None)


def test_a_request_that_is_too_late_is_not_begun(engine: Engine) -> None:
    """It expires, whether it was ever begun or not; one that has time is begun, and its attempt knows how much."""
    late = Request(engine, deadline=now() - timedelta(milliseconds=1))
    assert late.start() == NotStarted("expired", 0, "expired")
    assert late.kinds == ["received", "admitted", "expired"]
    deadline = now() + timedelta(hours=1)
    request = Request(engine, deadline=deadline)
    assert request.begun().deadline == deadline
    request.set(deadline=now() - timedelta(seconds=1))
    assert request.start("gpu-2") == NotStarted("expired", 1, "expired")
    assert request.kinds == ["received", "admitted", "started", "expired"]


def test_what_was_cancelled_and_is_too_late_was_cancelled(engine: Engine) -> None:
    """Somebody said so first."""
    request = Request(engine, deadline=now() + timedelta(hours=1))
    request.begun()
    request.cancel()
    request.set(deadline=now() - timedelta(seconds=1))
    assert request.start("gpu-2") == NotStarted("cancelled", 1, "cancelled")


def test_only_what_waits_and_is_too_late_expires(engine: Engine) -> None:
    """Looking at requests ends no other one: not those with time, those without a deadline, those that run."""
    past, future = now() - timedelta(seconds=1), now() + timedelta(hours=1)
    running = Request(engine, deadline=future)
    running.begun()
    running.set(deadline=past)
    others = [Request(engine), Request(engine, deadline=future), Request(engine, deadline=past)]
    for request in (running, *others, others[-1]):
        request.expire()
    assert [request.row.state for request in (running, *others)] == ["running", "queued", "queued", "expired"]
    assert others[-1].kinds == ["received", "admitted", "expired"]
    others[0].do(lambda connection: lifecycle.expire(connection, new_request_id()))
