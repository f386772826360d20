"""MetaQore is away when a request leaves the queue: it is waited for, and the request ends as it should all the same."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import worker_gpu.patience
from tasks.db import now
from tasks.governance.metaqore.projects import LiveProjects
from tasks.governance.policies import PolicyVersion
from tasks.governance.recheck import Recheck
from tasks.schema import TERMINAL_STATES, api_keys
from tests.metaqore_stand_in import StandIn
from tests.tasks.governance.metaqore.conftest import Ask
from tests.tasks.governance.metaqore.test_projects import P1
from tests.worker_gpu.scripted import ORGANIZATION, Message, Worker, endless, until, with_worker
from worker_gpu.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, Patience
from worker_gpu.scopes import Outcome

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
    # The pauses grow as they do elsewhere, from a shorter one, so that nobody has to wait for the tests.
    monkeypatch.setattr(worker_gpu.patience, "FIRST_PAUSE_S", 0.1)
    projects: LiveProjects = ask(cache_s=0, failure_cache_s=0, breaker_failures=1000)

    def with_patience(patience_s: float, work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
        async def working(worker: Worker) -> None:
            key = {"key_id": "key_1", "organization": ORGANIZATION, "name": "test", "key_hash": b"x" * 32}
            worker.database.write(lambda on: on.execute(sa.insert(api_keys), {**key, "created_at": now()}) and None)
            recheck = Recheck(worker.database, PolicyVersion(0, "default_local_first", "record"), projects)
            patience = Patience(worker.asking, worker.redis_keys.prefix, patience_s)
            worker.runner = replace(worker.runner, recheck=recheck, patience=patience)
            await work(worker)

        with_worker(working)

    return with_patience


async def see_through(worker: Worker, message: Message) -> Outcome:
    """Run a message, as often as it comes back, until its request has ended; return how the last run ended."""
    outcome = await worker.run(message)
    while worker.row(message).state not in TERMINAL_STATES:
        outcome = await (await worker.run_again(message))
    return outcome


async def waiting(worker: Worker, stand_in: StandIn, message: Message) -> asyncio.Task[Outcome]:
    """Begin to see a message through; return once MetaQore has been asked about it twice."""
    stand_in.calls.clear()
    task = asyncio.create_task(see_through(worker, message))
    worker.tasks.append(task)
    await until(lambda: len(stand_in.calls) >= 8)
    return task


def test_an_outage_that_is_shorter(run: Run, stand_in: StandIn) -> None:
    """The request runs as soon as there is an answer. Meanwhile it holds nothing, and nobody else waits for it."""
    stand_in.fail("503")

    async def work(worker: Worker) -> None:
        message, other = worker.message(decision=PROJECT), worker.message()
        task = await waiting(worker, stand_in, message)
        assert await asyncio.wait_for(worker.run(other), 10) == "completed"
        assert (worker.row(message).state, worker.row(message).attempt) == ("queued", 0)
        await until(lambda: worker.is_queued(message))
        await until(lambda: len(worker.runner.scopes) == 0)
        assert len(worker.engine.asked) == 1
        stand_in.fail(None)
        assert await task == "completed"
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
        assert await task != "completed"
        assert (worker.row(message).state, worker.row(message).error_code) == ("failed", "policy_veto")
        assert worker.engine.asked == []

    run(LONG_S, work)


@pytest.mark.parametrize("patience_s", [0.0, 0.4])
def test_an_outage_that_is_longer(run: Run, stand_in: StandIn, patience_s: float) -> None:
    """It ends as it would have without waiting. Without patience it is asked about once."""
    stand_in.fail("503")

    async def work(worker: Worker) -> None:
        message, began = worker.message(decision=PROJECT), time.monotonic()
        assert await see_through(worker, message) != "completed"
        assert patience_s <= time.monotonic() - began < patience_s + 5
        assert (worker.row(message).state, worker.row(message).error_code) == ("failed", "project_unverified")
        event = worker.terminal_event(message)
        assert (event.kind, event.details["psmp"]["conditions"][0]) == ("vetoed", "server_error")
        assert worker.frames(message)[-1].data["code"] == "project_unverified"
        worker.wait_until_let_go(message)
        assert worker.engine.asked == []
        assert len(worker.runner.scopes) == 0
        assert (len(stand_in.calls) == 4) == (patience_s == 0)

    run(patience_s, work)


@pytest.mark.parametrize("how", ["503", "hang"])
@pytest.mark.parametrize("begun", [False, True])
def test_cancelled_while_it_waits(run: Run, stand_in: StandIn, begun: bool, how: str) -> None:
    """Between two questions or in the middle of one; and so is another attempt, after the first one's worker was lost."""

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
        assert await task != "completed"
        assert time.monotonic() - began < 3.0
        # The thread that still asks need not wait for its timeout.
        stand_in.closing.set()
        worker.wait_until_let_go(message)
        if worker.is_queued(message):
            # It has ended; where its message was not withdrawn, the next worker lets it go.
            assert await (await worker.run_again(message)) != "completed"
        worker.check_end(message, "cancelled", "cancelled")
        assert len(worker.engine.asked) == begun

    run(LONG_S, work)


def test_too_late_while_it_waits(run: Run, stand_in: StandIn) -> None:
    """Its deadline is what ends it, and not before that."""
    stand_in.fail("503")

    async def work(worker: Worker) -> None:
        deadline = now() + timedelta(seconds=0.6)
        message = worker.message(decision=PROJECT, deadline=deadline)
        assert await see_through(worker, message) != "completed"
        assert 0 <= (now() - deadline).total_seconds() < 3
        worker.check_end(message, "expired", "expired")
        assert worker.engine.asked == []

    run(LONG_S, work)


def test_taken_again_while_it_is_asked_about(run: Run, stand_in: StandIn) -> None:
    """Redis was away for longer than a lease: whoever took the message last goes on with it, and ends it once."""
    stand_in.fail("hang")

    async def work(worker: Worker) -> None:
        message = worker.message(decision=PROJECT)
        older = worker.run(message)
        await until(lambda: len(worker.runner.scopes))
        scope = worker.runner.scopes[message.job.request_id]
        newer = worker.run(message)
        assert await asyncio.wait_for(older, 10) != "completed"
        assert scope.reason == "superseded"
        assert worker.is_leased(message)
        stand_in.fail(None)
        stand_in.closing.set()
        if not await newer:
            assert await see_through(worker, message) == "completed"
        worker.check_end(message, "completed", None)
        assert worker.row(message).attempt == 1

    run(LONG_S, work)


# --- Pauses ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("database_kind")
def test_pauses_grow_and_are_never_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon at first, and at most every few seconds; the last one ends with the patience."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    random.seed(seed)
    waited_s = 0.0

    async def waited(_patience: Patience, _request_id: str) -> float:
        return waited_s

    monkeypatch.setattr(Patience, "_waited_s", waited)
    patience = Patience(AsyncRedis(), "test:", LONG_S)
    pauses = []
    while (pause_s := asyncio.run(patience.pause_s("gw_1"))) is not None:
        longest = min(max(waited_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        assert min(longest / 2, LONG_S - waited_s) <= pause_s <= longest
        pauses.append(pause_s)
        waited_s += pause_s
    assert waited_s == pytest.approx(LONG_S)
    assert 12 < len(pauses) < 40
    assert len(set(pauses)) == len(pauses)


@pytest.mark.usefixtures("database_kind")
def test_all_workers_know_how_long_it_has_waited(redis_url: str) -> None:
    """Redis remembers it, for a while; where Redis cannot say, it is asked again after the longest pause."""

    async def work() -> None:
        async with AsyncRedis.from_url(redis_url) as client:
            workers = [Patience(client, "test:", 0.3) for _ in range(2)]
            assert await workers[0].pause_s("gw_1") is not None
            await asyncio.sleep(0.35)
            assert await workers[1].pause_s("gw_1") is None
            assert await workers[1].pause_s("gw_2") is not None
            assert 0 < await client.ttl("test:patience:gw_1") < 3600
        async with AsyncRedis(port=1, retry=Retry(NoBackoff(), 0)) as nobody:
            with pytest.raises(redis.RedisError):
                await nobody.ping()
            assert await Patience(nobody, "test:", 0.3).pause_s("gw_1") == LONGEST_PAUSE_S

    asyncio.run(work())
