"""MetaQore is away when a request leaves the queue: it is waited for, and the request ends as it should all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

import worker_gpu.patience
from tasks.db import now
from tasks.governance.metaqore.projects import LiveProjects
from tasks.governance.policies import PolicyVersion
from tasks.governance.recheck import Recheck
from tasks.lifecycle import Refusal
from tasks.schema import api_keys
from tests.metaqore_stand_in import StandIn
from tests.tasks.governance.metaqore.conftest import Ask
from tests.tasks.governance.metaqore.test_projects import P1
from tests.worker_gpu.test_runner import ORGANIZATION, Message, Worker, endless, three_words, until, with_worker
from worker_gpu.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, look_again

UNANSWERED = Refusal("vetoed", "project_unverified", {})
PROJECT = {"project_id": P1}
#: Longer than any test.
LONG_S = 60.0

pytestmark = [
    pytest.mark.usefixtures("configured"),
    pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True),
]
Run = Callable[[float, Callable[[Worker], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def run(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that has a test work with a worker that is so patient and asks the stand-in."""
    # The pauses double as they do elsewhere, from a shorter one, so that nobody has to wait for the tests.
    monkeypatch.setattr(worker_gpu.patience, "FIRST_PAUSE_S", 0.1)
    projects: LiveProjects = ask(cache_s=0, failure_cache_s=0, breaker_failures=1000)

    def with_patience(patience_s: float, work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
        async def working(worker: Worker) -> None:
            key = {"key_id": "key_1", "organization": ORGANIZATION, "name": "test", "key_hash": b"x" * 32}
            worker.database.write(lambda on: on.execute(sa.insert(api_keys), {**key, "created_at": now()}) and None)
            recheck = Recheck(worker.database, PolicyVersion(0, "default_local_first", "record"), projects)
            worker.runner = replace(worker.runner, recheck=recheck.refusal, patience_s=patience_s)
            await work(worker)

        with_worker(working)

    return with_patience


async def waiting(worker: Worker, stand_in: StandIn, message: Message) -> asyncio.Task[bool]:
    """Begin to run a message; return once MetaQore has been asked about it twice, and its request waits."""
    stand_in.calls.clear()
    task = worker.run(message)
    await until(lambda: len(stand_in.calls) >= 8 and worker.runner.scopes)
    return task


def test_an_outage_that_is_shorter(run: Run, stand_in: StandIn) -> None:
    """The request runs as soon as there is an answer. Nobody else waits for it, and its lease is kept."""
    stand_in.fail("503")

    async def work(worker: Worker) -> None:
        message, other = worker.message(decision=PROJECT), worker.message()
        task = await waiting(worker, stand_in, message)
        assert await asyncio.wait_for(worker.run(other), 10)
        assert (worker.row(message).state, worker.row(message).attempt) == ("queued", 0)
        assert worker.is_leased(message)
        assert len(worker.engine.asked) == 1
        stand_in.fail(None)
        assert await task
        worker.check_end(message, "completed", None)
        # The wait is part of the time in the queue.
        timings = worker.result(message).timings
        assert timings.queued_ms > 500 + 50

    run(LONG_S, work)


def test_what_is_learnt_in_the_end_counts(run: Run, stand_in: StandIn) -> None:
    """A project that is blocked by then refuses the request for good."""
    stand_in.fail("503")

    async def work(worker: Worker) -> None:
        message = worker.message(decision=PROJECT)
        task = await waiting(worker, stand_in, message)
        stand_in.add(1, "blocked")
        stand_in.fail(None)
        assert not await task
        assert (worker.row(message).state, worker.row(message).error_code) == ("failed", "policy_veto")
        assert worker.engine.asked == []

    run(LONG_S, work)


@pytest.mark.parametrize("patience_s", [0.0, 0.4])
def test_an_outage_that_is_longer(run: Run, stand_in: StandIn, patience_s: float) -> None:
    """It ends as it would have without waiting. Without patience it is asked about once."""
    stand_in.fail("503")

    async def work(worker: Worker) -> None:
        message, began = worker.message(decision=PROJECT), time.monotonic()
        assert not await worker.run(message)
        assert patience_s <= time.monotonic() - began < patience_s + 2
        assert (worker.row(message).state, worker.row(message).error_code) == ("failed", "project_unverified")
        event = worker.terminal_event(message)
        assert (event.kind, event.details["psmp"]["conditions"][0]) == ("vetoed", "server_error")
        assert worker.frames(message)[-1].data["code"] == "project_unverified"
        assert not worker.is_leased(message)
        assert worker.engine.asked == []
        assert worker.runner.scopes == {}
        assert (len(stand_in.calls) == 4) == (patience_s == 0)

    run(patience_s, work)


@pytest.mark.parametrize("how", ["503", "hang"])
@pytest.mark.parametrize("begun", [False, True])
def test_cancelled_while_it_waits(run: Run, stand_in: StandIn, begun: bool, how: str) -> None:
    """At once, also in the middle of a question; and so is another attempt, after the first one's worker was lost."""

    async def work(worker: Worker) -> None:
        message = worker.message(decision=PROJECT)
        if begun:
            worker.engine.script = endless
            lost = await worker.running(message)
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)
        stand_in.fail("503")
        task = await waiting(worker, stand_in, message)
        if how == "hang":
            stand_in.fail("hang")
            stand_in.calls.clear()
            await until(lambda: len(stand_in.calls) == 4)
        began = time.monotonic()
        worker.cancel(message)
        assert not await task
        assert time.monotonic() - began < 1.0
        # The thread that still asks need not wait for its timeout.
        stand_in.closing.set()
        worker.check_end(message, "cancelled", "cancelled")
        assert len(worker.engine.asked) == begun

    run(LONG_S, work)


def test_too_late_while_it_waits(run: Run, stand_in: StandIn) -> None:
    """Its deadline is what ends it, and not before that."""
    stand_in.fail("503")

    async def work(worker: Worker) -> None:
        deadline = now() + timedelta(seconds=0.6)
        message = worker.message(decision=PROJECT, deadline=deadline)
        assert not await worker.run(message)
        assert 0 <= (now() - deadline).total_seconds() < 1
        worker.check_end(message, "expired", "expired")
        assert worker.engine.asked == []

    run(LONG_S, work)


def test_taken_again_while_it_waits(run: Run, stand_in: StandIn) -> None:
    """Redis was away for longer than a lease: whoever took the message last goes on with it, and ends it once."""
    stand_in.fail("503")

    async def work(worker: Worker) -> None:
        worker.engine.script = three_words
        message = worker.message(decision=PROJECT)
        older = await waiting(worker, stand_in, message)
        newer = await waiting(worker, stand_in, message)
        assert not await asyncio.wait_for(older, 10)
        assert worker.is_leased(message)
        stand_in.fail(None)
        assert await newer
        worker.check_end(message, "completed", None)
        assert worker.row(message).attempt == 1

    run(LONG_S, work)


@pytest.mark.usefixtures("database_kind")
def test_pauses_double_and_are_never_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon at first, and at most every few seconds."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    answers = iter([UNANSWERED] * 9 + [None])

    async def look() -> Refusal | None:
        return next(answers)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert asyncio.run(look_again(look, UNANSWERED, LONG_S)) is None
    for number, pause in enumerate(pauses):
        longest = min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S)
        assert longest / 2 <= pause <= longest
    assert len(pauses) == 10
    assert len(set(pauses[4:])) > 1
