"""An attempt that ends without an answer is recorded, and then the message goes back: to be tried again, or to end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, cast

import pytest

import worker_gpu.giving_back
from tasks import lifecycle
from tasks.db import now
from tasks.errors import DatabaseUnavailable, EngineDead, EngineFailed, ModelMismatch
from tasks.governance.recheck import Recheck
from tasks.queueing.leases import process_holder
from tasks.queueing.scripts import Scripts
from tests.reserving import reserve_one
from tests.worker_gpu.scripted import (
    ORGANIZATION,
    Message,
    Shelf,
    Worker,
    endless,
    three_words,
    until,
    with_worker,
    word,
)
from worker_gpu.engines.base import Delta, GenerationRequest
from worker_gpu.scopes import Reason

pytestmark = pytest.mark.usefixtures("configured")


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return which it is: what PostgreSQL does differently, the tests of the lifecycle look at."""
    kind: str = request.param
    return kind


def failing(error: Exception) -> Any:
    """Return a script that says a word and fails."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield word(1)
        raise error

    return script


@pytest.mark.parametrize("error", [EngineFailed(), ModelMismatch(), TimeoutError(), ValueError("xyzzy")], ids=str)
def test_what_may_go_better_is_tried_again(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """After a pause, and the text of the next attempt replaces that of the first. An engine's own time limit is not the
    request's deadline.
    """
    code = getattr(error, "code", "internal_error")

    async def work(worker: Worker) -> None:
        worker.engine.script = failing(error)
        message = worker.message(deadline=now() + timedelta(hours=1))
        assert await worker.run(message) != "completed"
        worker.wait_until_let_go(message)
        row = worker.row(message)
        assert (row.state, row.attempt, row.excused) == ("queued", 1, 0)
        assert row.not_before > row.published_at
        worker.engine.script = three_words
        assert await (await worker.run_again(message)) == "completed"
        worker.check_end(message, "completed", None)
        assert worker.result(message).text == "1 2 3 "
        assert [frame.event for frame in worker.frames(message) if frame.cursor.sequence == 0] == ["started", "reset"]
        kinds = [("started", None), ("requeued", code), ("started", None), ("completed", None)]
        assert worker.kinds(message)[2:] == kinds

    with_worker(work)
    assert "xyzzy" not in caplog.text


def test_the_last_attempt_is_the_end() -> None:
    """After three of them the request is dead; its watchers are told, and the queue has nothing of it."""

    async def work(worker: Worker) -> None:
        worker.engine.script = failing(EngineFailed())
        message = worker.message()
        assert await worker.run(message) != "completed"
        for _ in range(2):
            assert await (await worker.run_again(message)) != "completed"
        worker.check_end(message, "dead", "attempts_exhausted")
        assert worker.terminal_event(message).details == {"last_code": "engine_failed"}
        assert worker.row(message).attempt == 3

    with_worker(work)


def test_attempts_that_the_engine_took_with_it_count() -> None:
    """The request may be what killed it."""

    async def work(worker: Worker) -> None:
        worker.engine.script = failing(EngineDead())
        message = worker.message()
        with pytest.raises(EngineDead):
            await worker.run(message)
        assert (worker.row(message).state, worker.row(message).excused) == ("queued", 0)

    with_worker(work)


@pytest.mark.parametrize(
    ("reason", "excused", "code"),
    [("worker_draining", 1, "worker_draining"), ("engine_dead", 0, "engine_dead")],
)
def test_what_runs_is_given_back_when_the_worker_ends(reason: Reason, excused: int, code: str) -> None:
    """The engine's slot is free, and the next worker says all of it; a drain does not count against the request."""

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        message = worker.message()
        task = await worker.running(message)
        worker.runner.scopes.stop_all(reason)
        assert await task != "completed"
        assert worker.engine.running == set()
        worker.wait_until_let_go(message)
        row = worker.row(message)
        assert (row.state, row.attempt, row.excused) == ("queued", 1, excused)
        assert worker.kinds(message)[-1] == ("requeued", code)
        worker.engine.script = three_words
        assert await (await worker.run_again(message)) == "completed"
        worker.check_end(message, "completed", None)

    with_worker(work)


class Asking:
    """Governance that has to ask about a request's project."""

    asks_projects = True


@pytest.mark.parametrize("asking", [True, False])
@pytest.mark.parametrize("reason", ["worker_draining", "engine_dead", "lease_lost"])
def test_what_has_not_begun_leaves_no_trace(reason: Reason, asking: bool) -> None:
    """While governance still asks about its project: the message goes back at once, or stays with its new owner, and no
    attempt counts. So it is while the database is away.
    """

    async def work(worker: Worker) -> None:
        looking = asyncio.Event()

        async def look(_work: Any) -> None:
            looking.set()
            if asking:
                await asyncio.Event().wait()
            raise DatabaseUnavailable

        agreeing = worker.runner.recheck
        worker.runner = replace(worker.runner, recheck=cast("Recheck", Asking()) if asking else agreeing)
        worker.runner.records.in_thread = look  # type: ignore[method-assign, assignment]
        worker.runner.records.try_write = look  # type: ignore[method-assign, assignment]
        message = worker.message()
        task = worker.run(message)
        await looking.wait()
        await asyncio.sleep(0)
        worker.runner.scopes.stop_all(reason, but_begun=True)
        assert await task != "completed"
        if reason == "lease_lost":
            assert message.tag not in worker.leases.held
        else:
            worker.wait_until_let_go(message)
            assert worker.is_queued(message)
        assert worker.kinds(message) == [("received", None), ("admitted", None)]

    with_worker(work)


def test_draining_leaves_what_has_begun_for_a_while() -> None:
    """It has its grace time."""

    async def work(worker: Worker) -> None:
        shelf = cast("Shelf", worker.runner.static_parts)
        shelf.available.clear()
        message = worker.message()
        task = worker.run(message)
        await until(lambda: worker.row(message).state == "running")
        worker.runner.scopes.stop_all("worker_draining", but_begun=True)
        shelf.available.set()
        assert await task == "completed"
        worker.check_end(message, "completed", None)

    with_worker(work)


def test_a_lease_that_went_to_another_process() -> None:
    """The run here ends without touching the message, which is the other's, and the attempt does not count."""

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        message = worker.message()
        task = await worker.running(message)
        queue = Scripts(worker.client, worker.redis_keys)
        queue.run("give_back", process_holder(), message.tag, 0, message.record)
        taken = reserve_one(queue, "another")
        assert taken is not None
        assert taken[0].decode() == message.tag
        await until(lambda: worker.lost)
        assert worker.lost == [message.tag]
        worker.runner.scopes.lose(message.tag)
        assert await task != "completed"
        assert worker.client.hget(worker.redis_keys.named("holders"), message.tag) == b"another"
        assert (worker.row(message).state, worker.row(message).excused) == ("queued", 1)
        assert worker.kinds(message)[-1] == ("requeued", "lease_lost")

    with_worker(work)


def test_published_again_while_it_runs() -> None:
    """Redis lost its message, and this very worker gets the new one: it goes on with that, and lets go of the old one. When
    the old one turns up later, it stops nothing.
    """

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        older = worker.message()
        lost = await worker.running(older)
        newer = worker.republish(older)
        running = await worker.running(newer, attempt=2)
        assert await lost != "completed"
        worker.wait_until_let_go(older)
        assert (worker.is_queued(older), worker.is_leased(newer)) == (False, True)
        worker.leases.hold(older.tag, older.record)
        assert await worker.run(older) != "completed"
        assert not running.done()
        assert older.tag not in worker.leases.held
        worker.cancel(newer)
        assert await running != "completed"
        worker.check_end(newer, "cancelled", "cancelled")

    with_worker(work)


@pytest.mark.parametrize("how", ["cancelled", "expired"])
def test_nobody_waits_for_another_attempt(how: str) -> None:
    """It fails, and meanwhile it was cancelled, or its time is over: that is its end."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield word(1)
        await asyncio.sleep(0)
        if how == "expired":
            time.sleep(max(0.0, (deadline - now()).total_seconds()) + 0.01)  # noqa: ASYNC251  nothing else may notice
        raise EngineFailed

    deadline = now() + timedelta(seconds=1.5)

    async def work(worker: Worker) -> None:
        message = worker.message(deadline=deadline if how == "expired" else None)
        worker.engine.script = script
        if how == "cancelled":
            started = lifecycle.start

            def start_and_cancel(on: Any, *arguments: Any) -> Any:
                attempt = started(on, *arguments)
                lifecycle.cancel(on, message.job.request_id, ORGANIZATION)
                return attempt

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lifecycle, "start", start_and_cancel)
                assert await worker.run(message) != "completed"
        else:
            assert await worker.run(message) != "completed"
        worker.check_end(message, how, how)

    with_worker(work)


# --- Messages that are none ------------------------------------------------------------------------


def damaged(message: Message) -> None:
    """Change what the signature covers."""
    message.envelope = {**message.envelope, "hash": "canary"}


def test_a_message_that_cannot_be_verified(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perhaps another worker has the key: it goes back twice, and is then set aside. Its request stays open for whoever
    publishes it again.
    """
    monkeypatch.setattr(worker_gpu.giving_back, "UNVERIFIED_PAUSE_S", 0.05)

    async def work(worker: Worker) -> None:
        message = worker.message()
        damaged(message)
        assert await worker.run(message) != "completed"
        for _ in range(2):
            worker.wait_until_let_go(message)
            assert worker.is_queued(message)
            assert await (await worker.run_again(message)) != "completed"
        worker.wait_until_let_go(message)
        assert not worker.is_queued(message)
        assert worker.client.llen(worker.redis_keys.named("refused")) == 1
        assert worker.row(message).state == "queued"
        assert worker.kinds(message) == [("received", None), ("admitted", None)]

    with_worker(work)
    assert "canary" not in caplog.text
    assert "the message's signature is wrong" in caplog.text


def test_a_message_under_anothers_name() -> None:
    """Signed as it is, but not what the queue says it is: it does not run, under neither name."""

    async def work(worker: Worker) -> None:
        message, other = worker.message(), worker.message()
        message.envelope = other.envelope
        assert await worker.run(message) != "completed"
        assert worker.engine.asked == []
        assert worker.kinds(other) == worker.kinds(message) == [("received", None), ("admitted", None)]
        assert await worker.run(other) == "completed"

    with_worker(work)


# --- The last attempt ------------------------------------------------------------------------------


async def lose(worker: Worker, *messages: Message) -> None:
    """Run messages beside one another until their worker is lost, and take them again."""
    tasks = [await worker.running(message, worker.row(message).attempt + 1) for message in messages]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for message in messages:
        message.came_back += 1


def test_last_attempts_are_not_shared() -> None:
    """What was lost together comes back together, and one of it may be what kills each worker. In the last attempt each
    is alone with the fresh ones, so that only that one dies.
    """

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        suspects = [worker.message() for _ in range(3)]
        await lose(worker, *suspects)
        await lose(worker, *suspects)
        tasks = [worker.run(message) for message in suspects]
        fresh = await worker.running(worker.message())
        await until(lambda: len(worker.engine.running) == 2)
        await asyncio.sleep(0.2)
        assert sorted(worker.row(message).attempt for message in suspects) == [2, 2, 3]
        # Those that wait hold up nobody whom the engine could serve.
        assert [message.progress.waits - message.progress.waited for message in suspects].count(1) == 2
        # The first one ends; then the next has its turn, and then the last.
        for turn in range(3):
            (now_running,) = (one for one in suspects if worker.row(one).state == "running" and has(worker, one))
            worker.cancel(now_running)
            await until(partial(has_ended, worker, now_running))
            if turn < 2:
                await until(lambda: any(has(worker, one) for one in suspects))
        assert await asyncio.gather(*tasks) == ["cancelled"] * 3
        assert not fresh.done()

    with_worker(work)


def has_ended(worker: Worker, message: Message) -> bool:
    """Tell whether a request was cancelled."""
    return bool(worker.row(message).state == "cancelled")


def has(worker: Worker, message: Message) -> bool:
    """Tell whether the engine runs the third attempt of a request."""
    return f"{message.job.request_id}-3" in worker.engine.running


@pytest.mark.parametrize("how", ["worker_draining", "cancelled", "expired"])
def test_waiting_for_the_last_attempt_ends_early(how: str) -> None:
    """A drain, a cancel or its deadline do not wait for it."""

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        deadline = now() + timedelta(seconds=2.5)
        first, second = worker.message(), worker.message(deadline=deadline if how == "expired" else None)
        await lose(worker, first, second)
        await lose(worker, first, second)
        running = await worker.running(first, 3)
        waiting = worker.run(second)
        await until(lambda: len(worker.runner.scopes) == 2)
        await asyncio.sleep(0.1)
        if how == "cancelled":
            worker.cancel(second)
        elif how == "worker_draining":
            worker.runner.scopes.stop_all("worker_draining", but_begun=True)
        assert await waiting != "completed"
        assert not running.done()
        worker.wait_until_let_go(second)
        assert worker.is_queued(second) == (how == "worker_draining")
        assert worker.row(second).state == {"worker_draining": "running"}.get(how, how)
        assert worker.row(second).attempt == 2

    with_worker(work)
