"""Admission, attempts and their ends, one by one, on both databases."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from tasks import lifecycle
from tasks.audit.events import ciphertext_hash
from tasks.ids import new_request_id
from tasks.lifecycle import FIRST_EPOCH, NotStarted
from tasks.schema import TERMINAL_STATES
from tests.tasks.lifecycle.admitted import WORKERS, End, Request, new_admission


def test_admission_is_recorded_with_what_was_stored(engine: Engine) -> None:
    """The event commits to the stored ciphertext."""
    request = Request(engine)
    row = request.row
    assert (row.state, row.epoch, row.attempt, row.worker) == ("queued", 1, 0, None)
    assert request.kinds == ["received", "admitted"]
    admitted = request.events[1]
    assert admitted.payload_sha256 == ciphertext_hash(row.payload)
    assert admitted.policy == "default_local_first"
    assert (row.api, row.priority, row.project_id, row.deadline) == ("tasks", "normal", "proj_1", None)
    assert (row.message, row.prompt_tokens, row.excused, row.not_before) == (b"sealed message", 700, 0, None)


def test_an_admission_is_whole_or_not_at_all(engine: Engine) -> None:
    """The same id a second time changes nothing, although the row comes before the events."""
    request = Request(engine)
    again = replace(new_admission(), subject=request.subject, payload=b"other")
    with pytest.raises(sa.exc.IntegrityError):
        request.do(lambda connection: lifecycle.admit(connection, again))
    assert request.row.payload == b"sealed payload"
    assert request.kinds == ["received", "admitted"]


def test_the_answer_of_the_second_attempt(engine: Engine) -> None:
    """The first worker was given up for lost; what it says later changes nothing."""
    request = Request(engine)
    lost, second = request.begun("gpu-1"), request.begun("gpu-2")
    assert (lost.number, second.number) == (1, 2)
    assert not request.answer(lost, "late")
    assert not request.finish(lost, "failed")
    assert request.answer(second)
    assert not request.answer(lost, "later")
    row = request.row
    assert (row.state, row.attempt, row.worker, row.result) == ("completed", 2, "gpu-2", b"one")
    assert request.kinds == ["received", "admitted", "started", "started", "completed"]


def test_repeating_ones_own_end(engine: Engine) -> None:
    """True each time, recorded once, and the first answer stays."""
    request = Request(engine)
    attempt = request.begun()
    assert [request.answer(attempt, text) for text in ("one", "two", "one")] == [True] * 3
    assert request.row.result == b"one"
    assert request.kinds.count("completed") == 1
    assert not request.finish(attempt, "failed")
    assert request.row.state == "completed"


@pytest.mark.parametrize("state", TERMINAL_STATES)
def test_a_request_that_ended_is_not_started(engine: Engine, state: End) -> None:
    """A redelivered message is told how it ended, so that watchers can be told again."""
    request = Request(engine)
    attempt = request.begun()
    assert request.finish(attempt, state, "some_code")
    assert request.start("gpu-2") == NotStarted(state, 1, "some_code")
    assert request.kinds.count("started") == 1


def test_a_message_of_an_older_epoch(engine: Engine) -> None:
    """It leads nowhere, and who runs under it can no longer finish; the new epoch goes on counting attempts."""
    request = Request(engine)
    old = request.begun("gpu-1")
    assert request.republish(attempt=1) is not None
    assert request.start("gpu-2", FIRST_EPOCH) == NotStarted("queued", 1, None)
    assert request.start("gpu-2", FIRST_EPOCH + 2) == NotStarted("queued", 1, None)
    assert not request.answer(old, "late")
    assert not request.finish(old, "failed")
    new = request.begun("gpu-2", FIRST_EPOCH + 1)
    assert new.number == 2
    assert request.answer(new)
    assert not request.answer(old)


def test_no_such_request(engine: Engine) -> None:
    """A message of a request that this database has never seen, as after a restored backup."""
    request = Request(engine)
    request.id = new_request_id()
    assert request.start() == NotStarted(None)


def test_attempts_exhausted(engine: Engine) -> None:
    """After the last allowed start the request is dead, once; then all agree, and the lost attempts change nothing."""
    request = Request(engine)
    attempts = [request.begun(worker) for worker in WORKERS]
    for _ in range(2):
        assert request.start() == NotStarted("dead", 3, "attempts_exhausted")
    row = request.row
    assert (row.state, row.error_code, row.attempt) == ("dead", "attempts_exhausted", 3)
    assert [request.answer(attempt) for attempt in attempts] == [False] * 3
    assert request.kinds == ["received", "admitted", *["started"] * 3, "dead"]
    assert request.events[-1].details == {"last_code": "worker_lost"}


def test_an_end_that_is_no_state(engine: Engine) -> None:
    """The database refuses it, and the whole transaction with it."""
    request = Request(engine)
    attempt = request.begun()
    for state in ("vetoed", "queued ", "nonsense"):
        with pytest.raises(sa.exc.IntegrityError):
            request.finish(attempt, cast("End", state))
    assert request.row.state == "running"
    assert request.answer(attempt)
