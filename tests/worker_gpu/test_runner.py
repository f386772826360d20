"""However a request ends, it is recorded once, then told, then let go; what was said is in Redis as it is in SQL.

The runner works here with everything that it has in a worker but the engine, which says what a test tells it to.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any, cast

import pytest

import worker_gpu.records
from tasks import lifecycle
from tasks.crypto import seal
from tasks.db import now
from tasks.errors import DatabaseUnavailable, EngineDead, EngineFailed, GatewayError, PromptTooLong, Unsupported
from tasks.ids import new_request_id
from tasks.job import Result
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


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return which it is: what PostgreSQL does differently, the tests of the lifecycle look at."""
    kind: str = request.param
    return kind


pytestmark = pytest.mark.usefixtures("configured")


def test_an_answer() -> None:
    """Recorded with its figures, told as it was said, and let go."""

    async def work(worker: Worker) -> None:
        message = worker.message()
        assert await worker.run(message) == "completed"
        worker.check_end(message, "completed", None)
        result = worker.result(message)
        assert (result.text, result.finish_reason, result.model) == ("1 2 3 ", "stop", "tiny")
        assert (result.usage.prompt_tokens, result.usage.cached_tokens, result.usage.output_tokens) == (5, 4, 3)
        assert result.timings.prefill_ms == 250
        assert result.timings.first_token_ms is not None
        assert 500 <= result.timings.queued_ms <= result.timings.first_token_ms <= result.timings.total_ms
        assert worker.engine.asked[0].prompt_token_ids == [1, 2, 3, 7, 8]
        assert worker.runner.served == {ORGANIZATION: 3}

    with_worker(work)


def test_several_choices() -> None:
    """They come mixed; each has its own text and its own end, in the order of choices."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        for number, choice in enumerate((2, 0, 1, 0, 2, 1), start=1):
            yield word(number, choice=choice, last=number > 3)

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        message = worker.message(n=3)
        assert await worker.run(message) == "completed"
        worker.check_end(message, "completed", None)
        assert [choice.text for choice in worker.result(message).choices] == ["2 4 ", "3 6 ", "1 5 "]
        assert worker.result(message).finish_reasons == ("stop",) * 3

    with_worker(work)


@pytest.mark.parametrize("ended", [0, 1])
def test_an_engine_that_does_not_say_how_each_choice_ended(ended: int) -> None:
    """That is a failure, not an answer."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        for choice in (0, 1):
            yield word(choice + 1, choice=choice, last=choice < ended)

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        message = worker.message(n=2)
        assert await worker.run(message) != "completed"
        assert worker.row(message).state == "queued"
        assert worker.kinds(message)[-1] == ("requeued", "engine_failed")

    with_worker(work)


# --- Stopped --------------------------------------------------------------------------------------


def test_cancelled_while_it_runs() -> None:
    """At once: the engine's slot is free, and what was said so far is recorded with what it cost."""

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        message, other = worker.message(), worker.message()
        task, going_on = await worker.running(message), await worker.running(other)
        began = time.monotonic()
        worker.cancel(message)
        assert await task != "completed"
        print(f"cancelled in {(time.monotonic() - began) * 1000:.0f} ms")
        assert worker.engine.running == {f"{other.job.request_id}-1"}
        worker.cancel(other)
        assert await going_on != "completed"
        for ended in (message, other):
            worker.check_end(ended, "cancelled", "cancelled")
            result = worker.result(ended)
            assert (result.text, result.finish_reasons, result.choices[0].finish_reason) == ("1 2 ", (), None)
            event = worker.terminal_event(ended)
            assert (event.prompt_tokens, event.cached_tokens, event.output_tokens) == (5, 4, 2)
            assert worker.runner.served == {ORGANIZATION: 4}
            assert (event.worker, event.model, event.details) == ("gpu@test", "tiny", {"finish_reason": None})

    with_worker(work)


def test_cancelled_before_the_first_token() -> None:
    """Nothing was said, and nothing is pretended."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        await asyncio.Event().wait()
        yield word(1)

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        message = worker.message()
        task = worker.run(message)
        await until(lambda: worker.engine.running)
        worker.cancel(message)
        assert await task != "completed"
        worker.check_end(message, "cancelled", "cancelled")
        result = worker.result(message)
        assert (result.pieces, result.usage.output_tokens, result.usage.prompt_tokens) == ((), 0, 5)
        assert (result.timings.first_token_ms, result.timings.prefill_ms) == (None, None)

    with_worker(work)


def test_cancelled_before_the_engine_has_it() -> None:
    """While its profile is still being read: it does not have to be heard of a second time."""

    async def work(worker: Worker) -> None:
        shelf = cast("Shelf", worker.runner.static_parts)
        shelf.available.clear()
        message = worker.message()
        task = worker.run(message)
        await until(lambda: worker.row(message).state == "running" and worker.runner.scopes)
        worker.cancel(message)
        assert await task != "completed"
        worker.check_end(message, "cancelled", "cancelled")
        assert worker.engine.asked == []

    with_worker(work)


def test_too_late_while_it_runs() -> None:
    """The deadline passes in the middle of the answer: it expires there and then, with what was said."""

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        deadline = now() + timedelta(seconds=1)
        message = worker.message(deadline=deadline)
        assert await (await worker.running(message)) != "completed"
        late_s = (now() - deadline).total_seconds()
        print(f"expired {late_s * 1000:.0f} ms after the deadline")
        assert late_s >= 0
        worker.check_end(message, "expired", "expired")
        assert worker.result(message).text == "1 2 "
        assert worker.terminal_event(message).output_tokens == 2

    with_worker(work)


def test_an_answer_in_time() -> None:
    """A deadline that is not reached changes nothing."""

    async def work(worker: Worker) -> None:
        message = worker.message(deadline=now() + timedelta(hours=1))
        assert await worker.run(message) == "completed"
        worker.check_end(message, "completed", None)

    with_worker(work)


@pytest.mark.parametrize("first", ["cancelled", "expired"])
def test_stopped_for_two_reasons(first: str) -> None:
    """An engine that takes a while to let go hears of the second reason meanwhile: the first one counts, and whoever
    said the second does no harm to the worker.
    """

    async def work(worker: Worker) -> None:
        worker.engine.script, worker.engine.closing_s = endless, 0.5
        message = worker.message(deadline=now() + timedelta(seconds=0.6))
        task = await worker.running(message)
        scope = worker.runner.scopes[message.job.request_id]
        if first == "cancelled":
            worker.cancel(message)
        await until(lambda: scope.is_ending)
        assert worker.engine.running
        for _ in range(3):
            worker.cancel(message)
            await asyncio.sleep(0.01)
        assert await task != "completed"
        worker.check_end(message, first, first)

    with_worker(work)


def test_stopping_what_does_not_run_here() -> None:
    """Every worker hears of every cancelled request; most have nothing to do with it."""

    async def work(worker: Worker) -> None:
        done = worker.message()
        assert await worker.run(done) == "completed"
        for request_id in (done.job.request_id, new_request_id(), "", "nonsense"):
            worker.runner.scopes.stop(request_id, "cancelled")
        other = worker.message()
        assert await worker.run(other) == "completed"
        for message in (done, other):
            worker.check_end(message, "completed", None)

    with_worker(work)


@pytest.mark.parametrize("error", [PromptTooLong(), Unsupported("xyzzy")])
def test_what_no_engine_can_answer(error: GatewayError, caplog: pytest.LogCaptureFixture) -> None:
    """It would fail again, so it ends at the first attempt."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield word(1)
        raise error

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        for deadline in (None, now() + timedelta(hours=1)):
            message = worker.message(deadline=deadline)
            assert await worker.run(message) != "completed"
            worker.check_end(message, "failed", error.code)

    with_worker(work)
    assert "xyzzy" not in caplog.text


def test_an_engine_that_fails_when_it_is_stopped() -> None:
    """Then it failed, and nobody wants another attempt; there is one end, and the worker goes on."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield word(1)
        try:
            await asyncio.Event().wait()
        finally:
            raise EngineFailed

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        message = worker.message()
        task = await worker.running(message, words=1)
        worker.cancel(message)
        assert await task != "completed"
        worker.check_end(message, "cancelled", "cancelled")
        worker.engine.script = three_words
        assert await worker.run(worker.message()) == "completed"

    with_worker(work)


def test_an_engine_that_is_dead() -> None:
    """The attempt is given back before anything else: another worker gets the message."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield word(1)
        raise EngineDead

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        message = worker.message()
        with pytest.raises(EngineDead):
            await worker.run(message)
        worker.wait_until_let_go(message)
        assert (worker.row(message).state, worker.is_queued(message)) == ("queued", True)
        assert worker.kinds(message)[-1] == ("requeued", "engine_dead")
        assert len(worker.runner.scopes) == 0

    with_worker(work)


def test_the_database_is_away_when_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is free at once; the end is recorded as soon as it can be, and told only then."""

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        message = worker.message()
        task = await worker.running(message)
        worker.cancel(message)
        submit, refused = worker.database.submit, 0

        def away(write: Any) -> Any:
            nonlocal refused
            refused += 1
            if refused > 3:
                return submit(write)
            raise DatabaseUnavailable

        monkeypatch.setattr(worker.database, "submit", away)
        monkeypatch.setattr(worker_gpu.records, "RETRY_S", 0.05)
        await until(lambda: refused > 1)
        assert worker.engine.running == set()
        assert not worker.frames(message)[-1].terminal
        assert await task != "completed"
        worker.check_end(message, "cancelled", "cancelled")

    with_worker(work)


# --- Taken again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("closing_s", [0.0, 0.4])
def test_a_worker_that_gets_its_own_message_again(closing_s: float) -> None:
    """Redis was away for longer than a lease: the attempt that was given up for lost stops, whether the engine lets go of
    it at once or later; the new one answers, and can be cancelled.
    """

    async def work(worker: Worker) -> None:
        worker.engine.script, worker.engine.closing_s = endless, closing_s
        answered, cancelled = worker.message(), worker.message()
        lost = [await worker.running(answered), await worker.running(cancelled)]
        again = await worker.running(cancelled, attempt=2)
        worker.engine.script = three_words
        assert await worker.run(answered) == "completed"
        worker.cancel(cancelled)
        assert await again != "completed"
        assert await asyncio.gather(*lost) == ["fenced", "fenced"]
        worker.check_end(answered, "completed", None)
        worker.check_end(cancelled, "cancelled", "cancelled")
        assert [worker.row(message).attempt for message in (answered, cancelled)] == [2, 2]
        assert worker.result(answered).text == "1 2 3 "

    with_worker(work)


@pytest.mark.parametrize("state", ["completed", "cancelled", "expired"])
def test_a_worker_that_died_before_it_told(state: Any) -> None:
    """What it recorded is the whole of what was said, and Redis has a part: the next worker sends what is missing, text and
    last frame, and nothing twice.
    """

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        message = worker.message()
        dying = await worker.running(message)
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        shown = worker.frames(message)
        attempt = lifecycle.Attempt(message.subject, lifecycle.FIRST_EPOCH, 1, "gpu@test")
        said = [{"text": frame.data["text"]} for frame in shown if frame.event == "delta"]
        stored = Result.model_validate(
            {
                "pieces": [*said, {"text": "3 "}, {"text": "4 "}],
                "finish_reasons": ["stop"] if state == "completed" else [],
                "model": "tiny",
                "usage": {"prompt_tokens": 5, "cached_tokens": 4, "output_tokens": 4},
                "timings": {"queued_ms": 1.0, "total_ms": 2.0},
            }
        )
        sealed = seal(message.job.data_key, stored.model_dump_json().encode(), f"result:{message.job.request_id}")
        worker.database.write(lambda on: lifecycle.answer(on, attempt, stored, sealed, state))
        assert await worker.run(message) == state
        assert worker.frames(message)[: len(shown)] == shown
        assert worker.text(message) == "1 2 3 4 "
        worker.check_end(message, state, None if state == "completed" else state)

    with_worker(work)


def test_an_answer_that_cannot_be_read_any_more() -> None:
    """Its request has ended all the same, and its message is let go."""

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        message = worker.message()
        dying = await worker.running(message)
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        attempt = lifecycle.Attempt(message.subject, lifecycle.FIRST_EPOCH, 1, "gpu@test")
        worker.database.write(lambda on: lifecycle.finish(on, attempt, "completed", result=b"scrambled"))
        assert await worker.run(message) == "completed"
        worker.wait_until_let_go(message)
        assert not worker.is_queued(message)

    with_worker(work)


@pytest.mark.parametrize("state", ["cancelled", "expired"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_message_of_a_request_that_nobody_wants_any_more(state: str, begun: bool) -> None:
    """Cancelled, or too late, before this worker got it: it ends without the engine, and its watchers are told. So they
    are if a worker had begun it and was lost.
    """

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        soon = now() + timedelta(seconds=0.7)
        message = worker.message(deadline=soon if state == "expired" else None)
        if begun:
            lost = await worker.running(message)
            lost.cancel()
            await asyncio.gather(lost, return_exceptions=True)
        if state == "cancelled":
            worker.database.write(lambda on: lifecycle.cancel(on, message.job.request_id, ORGANIZATION))
        else:
            await until(lambda: now() > soon)
        asked = len(worker.engine.asked)
        assert await worker.run(message) != "completed"
        worker.check_end(message, state, state)
        assert len(worker.engine.asked) == asked
        assert worker.text(message) == ("1 2 " if begun else "")

    with_worker(work)


# --- At random ------------------------------------------------------------------------------------


@pytest.mark.parametrize("database_kind", ["sqlite", "postgresql"], indirect=True)
def test_cancelling_at_any_moment() -> None:
    """Sixty requests of random length, each cancelled at a random moment: each has one end, whichever was first, and
    what is stored of it is what was told.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        words = choose.randrange(1, 12)
        for number in range(1, words + 1):
            await asyncio.sleep(choose.choice([0, 0.001, 0.1]))
            yield word(number, last=number == words)

    async def cancel(worker: Worker, message: Message) -> None:
        await asyncio.sleep(choose.uniform(0, 0.6))
        await asyncio.to_thread(
            worker.database.write, lambda on: lifecycle.cancel(on, message.job.request_id, ORGANIZATION)
        )
        worker.runner.scopes.stop(message.job.request_id, "cancelled")

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        messages = [worker.message() for _ in range(60)]
        cancelling = [cancel(worker, message) for message in messages]
        running = [worker.run(message) for message in messages]
        await asyncio.gather(*cancelling)
        outcomes = await asyncio.gather(*running)
        ends = [worker.row(message).state for message in messages]
        for message, state, outcome in zip(messages, ends, outcomes, strict=True):
            assert outcome == state
            if state == "completed":
                worker.check_end(message, state, None)
                assert worker.result(message).finish_reason == "stop"
            else:
                worker.check_end(message, "cancelled", "cancelled")
        print({state: ends.count(state) for state in set(ends)})
        assert set(ends) == {"completed", "cancelled"}

    with_worker(work)
