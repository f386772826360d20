"""Attempts that end without an answer: queued again, dead after the last, and excused where nobody is to blame."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy.engine import Engine

from tasks.db import now
from tasks.lifecycle import FIRST_EPOCH, Attempt, NotStarted
from tasks.states import reached
from tests.tasks.lifecycle.admitted import Request


def test_a_failed_attempt_is_followed_by_another(engine: Engine) -> None:
    """The request is queued under the same epoch, with the time of its next attempt, and the record says why."""
    request, before = Request(engine), now()
    attempt = request.begun("gpu-1")
    assert request.give_back(attempt, "engine_dead", delay_s=30) == "queued"
    row = request.row
    assert (row.state, row.epoch, row.attempt, row.excused, row.error_code) == ("queued", 1, 1, 0, None)
    assert timedelta(seconds=30) <= row.not_before - before < timedelta(seconds=60)
    assert row.message == b"sealed message"
    said = request.events[-1]
    assert (said.kind, said.code, said.attempt, said.epoch, said.worker) == ("requeued", "engine_dead", 1, 1, "gpu-1")
    second = request.begun("gpu-2")
    assert (second.number, request.row.not_before) == (2, None)
    assert request.answer(second)
    assert request.row.message is None
    assert request.kinds == ["received", "admitted", "started", "requeued", "started", "completed"]
    assert reached(request.kinds) == {"completed"}


def test_who_gave_back_has_nothing_more_to_say(engine: Engine) -> None:
    """An answer that comes all the same is refused, although the row still carries the attempt's number."""
    request = Request(engine)
    attempt = request.begun()
    assert request.give_back(attempt) == "queued"
    assert not request.answer(attempt)
    assert not request.finish(attempt, "failed", "engine_failed")
    assert (request.row.state, request.kinds[-1]) == ("queued", "requeued")


def test_after_the_last_attempt_it_is_dead(engine: Engine) -> None:
    """With what the last attempt ended of; and nothing wakes it up again."""
    request = Request(engine)
    for number in (1, 2):
        assert request.give_back(request.begun(), "engine_failed") == "queued", number
    last = request.begun()
    assert [request.give_back(last, "engine_dead", delay_s=9) for _ in range(3)] == ["dead"] * 3
    row = request.row
    assert (row.state, row.error_code, row.attempt) == ("dead", "attempts_exhausted", 3)
    assert (row.message, row.not_before, row.finished_at is None) == (None, None, False)
    dead = request.events[-1]
    assert (dead.kind, dead.code, dead.details) == ("dead", "attempts_exhausted", {"last_code": "engine_dead"})
    assert request.kinds.count("dead") == 1
    assert request.start() == NotStarted("dead", 3, "attempts_exhausted")
    assert request.republish(attempt=3) is None
    assert not request.answer(last)
    request.cancel()
    assert request.row == row


def test_an_excused_attempt_does_not_count(engine: Engine) -> None:
    """However often workers are stopped under it, the request still has all its attempts."""
    request = Request(engine)
    for number in range(1, 6):
        attempt = request.begun()
        assert attempt.number == number
        assert request.give_back(attempt, "worker_draining", most=None) == "queued"
    assert (request.row.attempt, request.row.excused) == (5, 5)
    for _ in range(2):
        assert request.give_back(request.begun()) == "queued"
    assert request.give_back(request.begun()) == "dead"
    assert (request.row.attempt, request.row.excused) == (8, 5)


def test_workers_that_are_lost_and_stopped_in_turn(engine: Engine) -> None:
    """A lost attempt counts, a stopped one does not; after three that count, the next start finds the request dead."""
    request = Request(engine)
    request.begun("gpu-1")
    assert request.give_back(request.begun("gpu-2"), "worker_draining", most=None) == "queued"
    request.begun("gpu-3")
    request.begun("gpu-1")
    assert request.start("gpu-2") == NotStarted("dead", 4, "attempts_exhausted")
    assert (request.row.attempt - request.row.excused, request.events[-1].worker) == (3, "gpu-1")


def test_fewer_attempts_are_allowed_than_before(engine: Engine) -> None:
    """What waits for an attempt that there is none of any more is dead when its message comes; no worker was lost."""
    request = Request(engine)
    assert request.give_back(request.begun()) == "queued"
    assert request.start(most=1) == NotStarted("dead", 1, "attempts_exhausted")
    assert request.events[-1].details is None
    assert request.kinds == ["received", "admitted", "started", "requeued", "dead"]


def test_saying_it_again(engine: Engine) -> None:
    """The answer is the same, and is counted once, even where the next attempt has begun or ended meanwhile."""
    request = Request(engine)
    attempt = request.begun()
    for _ in range(3):
        assert request.give_back(attempt, "worker_draining", most=None) == "queued"
    assert (request.row.excused, request.kinds.count("requeued")) == (1, 1)
    second = request.begun("gpu-2")
    assert request.give_back(attempt, "worker_draining", most=None) == "queued"
    assert (request.row.state, request.row.excused) == ("running", 1)
    assert request.answer(second)
    assert request.give_back(attempt, "worker_draining", most=None) == "queued"
    assert request.row.state == "completed"


@pytest.mark.parametrize("most", [3, None])
def test_an_attempt_that_was_given_up_gives_nothing_back(engine: Engine, most: int | None) -> None:
    """Another attempt runs, or another epoch counts, or it has been answered: then this one is fenced off."""
    request = Request(engine)
    lost, second = request.begun("gpu-1"), request.begun("gpu-2")
    assert request.give_back(lost, most=most) == "fenced"
    assert request.row.state == "running"
    assert request.answer(second)
    assert request.give_back(second, most=most) == "fenced"
    assert request.row.state == "completed"
    other = Request(engine)
    old = other.begun()
    assert other.republish(attempt=1) is not None
    assert other.give_back(old, most=most) == "fenced"
    assert (other.row.epoch, other.row.excused) == (FIRST_EPOCH + 1, 1)
    nobody = Attempt(request.subject, FIRST_EPOCH, 7)
    assert request.give_back(nobody, most=most) == "fenced"


def test_what_was_cancelled_while_it_ran_is_not_tried_again(engine: Engine) -> None:
    """It ends, and stays so however often that is said."""
    request = Request(engine)
    attempt = request.begun()
    request.cancel()
    assert [request.give_back(attempt, delay_s=5) for _ in range(2)] == ["cancelled"] * 2
    assert (request.row.state, request.row.error_code) == ("cancelled", "cancelled")
    assert request.kinds == ["received", "admitted", "started", "cancelled"]


def test_what_is_too_late_is_not_tried_again(engine: Engine) -> None:
    """It expires; where there is time, another attempt may still be in time."""
    request = Request(engine, deadline=now() + timedelta(hours=1))
    assert request.give_back(request.begun()) == "queued"
    attempt = request.begun()
    request.set(deadline=now() - timedelta(seconds=1))
    assert [request.give_back(attempt) for _ in range(2)] == ["expired"] * 2
    assert request.kinds == ["received", "admitted", "started", "requeued", "started", "expired"]
