"""However a request ends, it is recorded once, then told, then let go; what was said is in Redis as it is in SQL.

The runner works here with everything that it has in a worker but the engine, which says what a test tells it to.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import pytest
import redis
import sqlalchemy as sa
from redis.asyncio import Redis as AsyncRedis

import worker_gpu.runner
from tasks import lifecycle
from tasks.audit.events import Subject
from tasks.crypto import KeyWrapper, Signer, unseal
from tasks.db import Database, now
from tasks.errors import DatabaseUnavailable, EngineDead, EngineFailed
from tasks.ids import new_request_id
from tasks.job import Job, Prompt, Result, Sampling
from tasks.queueing.keys import QueueKeys
from tasks.queueing.leases import Leases
from tasks.queueing.message import MessageCodec, delivery_tag
from tasks.schema import TERMINAL_KINDS, audit_events, requests
from tasks.settings import StreamingGroup, settings
from tasks.stream import FIELD, Cursor, Frame, replay, stream_key
from worker_gpu.engines.base import Delta, EngineLimits, GenerationRequest
from worker_gpu.profiles import StaticParts
from worker_gpu.runner import Runner
from worker_gpu.streams import StreamWriter

ORGANIZATION = "default"
#: For this long a test waits for what must come.
PATIENCE_S = 20.0
Script = Callable[[GenerationRequest], AsyncGenerator[Delta, None]]


def word(number: int, *, last: bool = False, choice: int = 0) -> Delta:
    """Return an engine's delta: the so-many-th token of its answer."""
    return Delta(
        text=f"{number} ",
        output_tokens=number,
        cached_tokens=4,
        prefill_s=0.25,
        finish_reason="stop" if last else None,
        choice=choice,
    )


async def three_words(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
    """Say what there is to say."""
    for number in (1, 2, 3):
        yield word(number, last=number == 3)


async def endless(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
    """Say two words, and never come to an end."""
    for number in (1, 2):
        yield word(number)
    await asyncio.Event().wait()


class ScriptedEngine:
    """Says what its script says. `running` has the requests that it holds a slot for; closing one may take a while."""

    limits = EngineLimits(max_model_len=4096, max_num_seqs=8, block_size=16)

    def __init__(self) -> None:
        self.script: Script = three_words
        self.running: set[str] = set()
        self.asked: list[GenerationRequest] = []
        self.closing_s = 0.0

    async def start(self) -> None:
        """Be ready as it is."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self.asked.append(request)
        self.running.add(request.request_id)
        try:
            async with aclosing(self.script(request)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            try:
                await asyncio.sleep(self.closing_s)
            finally:
                self.running.discard(request.request_id)

    async def check_health(self) -> None:
        """Be well."""

    async def stop(self) -> None:
        """Have nothing to end."""


@dataclass
class Message:
    """An admitted request and the message that a worker gets of it."""

    job: Job
    subject: Subject
    envelope: Any
    tag: str


@dataclass
class Worker:
    """A runner with what it needs, and what a test wants to know of it."""

    runner: Runner
    engine: ScriptedEngine
    database: Database
    codec: MessageCodec
    keys: KeyWrapper
    client: redis.Redis
    redis_keys: QueueKeys
    tasks: list[asyncio.Task[bool]] = field(default_factory=list)

    def message(self, *, n: int = 1, decision: Mapping[str, Any] | None = None, **columns: Any) -> Message:
        """Admit a request, and lease its message to this worker."""
        subject = Subject(new_request_id(), ORGANIZATION, "key_1", "incident-responder")
        data_key, wrapped = self.keys.new_key(subject.request_id)
        facts = {"api": "tasks", "priority": "normal", "deadline": None, **columns}
        admission = lifecycle.Admission(subject, decision or {}, "ab" * 32, wrapped, b"payload", facts)
        self.database.write(lambda on: lifecycle.admit(on, admission))
        job = Job(
            request_id=subject.request_id,
            epoch=lifecycle.FIRST_EPOCH,
            organization=ORGANIZATION,
            prompt=Prompt("ab" * 32, (7, 8), 5),
            sampling=Sampling(seed=1, n=n),
            published_at=time.time() - 0.5,
            data_key=data_key,
        )
        [[envelope], *_] = json.loads(json.loads(self.codec.encode(job, wrapped))["body"])
        tag = delivery_tag(job)
        self.client.hset(self.redis_keys.leased, tag, "message")
        self.client.zadd(self.redis_keys.leases, {tag: time.time()})
        return Message(job, subject, envelope, tag)

    def run(self, message: Message) -> asyncio.Task[bool]:
        """Begin to run a message."""
        self.tasks.append(asyncio.create_task(self.runner.run(message.envelope, message.tag)))
        return self.tasks[-1]

    async def running(self, message: Message, attempt: int = 1, words: int = 2) -> asyncio.Task[bool]:
        """Begin to run a message; return once so many words of it are in Redis."""
        task = self.run(message)
        said = "".join(f"{number} " for number in range(1, words + 1))
        await until(lambda: self.text(message, attempt) == said)
        return task

    def cancel(self, message: Message) -> None:
        """Cancel a request as the gateway does, and have the worker hear of it."""
        self.database.write(lambda on: lifecycle.cancel(on, message.job.request_id, ORGANIZATION))
        self.runner.stop(message.job.request_id)

    def row(self, message: Message) -> sa.Row[Any]:
        """Return the request's row."""
        query = sa.select(requests).where(requests.c.request_id == message.job.request_id)
        return self.database.read(lambda on: on.execute(query).one())

    def terminal_event(self, message: Message) -> sa.Row[Any]:
        """Return the request's only terminal event."""
        query = sa.select(audit_events).where(
            audit_events.c.request_id == message.job.request_id, audit_events.c.kind.in_(TERMINAL_KINDS)
        )
        return self.database.read(lambda on: on.execute(query).one())

    def result(self, message: Message) -> Result:
        """Return what is stored of the answer."""
        context = f"result:{message.job.request_id}"
        return Result.model_validate_json(unseal(message.job.data_key, self.row(message).result, context))

    def frames(self, message: Message) -> list[Frame]:
        """Return the frames that Redis has."""
        key = stream_key(self.redis_keys.prefix, message.job.request_id)
        entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", self.client.xrange(key))
        return [
            Frame.unseal(message.job.data_key, message.job.request_id, Cursor.parse(entry_id.decode()), fields[FIELD])
            for entry_id, fields in entries
        ]

    def text(self, message: Message, attempt: int = 1) -> str:
        """Return the text that an attempt's watchers see."""
        shown = [frame for frame in self.frames(message) if frame.cursor.attempt == attempt]
        return "".join(frame.data.get("text", "") for frame in shown)

    def is_leased(self, message: Message) -> bool:
        """Tell whether the message is still held."""
        return self.client.zscore(self.redis_keys.leases, message.tag) is not None

    def check_end(self, message: Message, state: str, code: str | None) -> None:
        """Check that the request ended like this, once, and that what is stored is what its watchers saw."""
        row, event = self.row(message), self.terminal_event(message)
        assert (row.state, row.error_code) == (state, code)
        assert (event.kind, event.code, event.attempt) == (state, code, row.attempt)
        last = [frame for frame in self.frames(message) if frame.cursor.attempt == row.attempt]
        if row.result is not None:
            assert last == list(replay(row.attempt, self.result(message), state, code))
        assert (last[-1].event, last[-1].terminal) == (state, True)
        assert not self.is_leased(message)
        assert self.engine.running == set()
        assert self.runner.scopes == {}


async def until(condition: Callable[[], object]) -> None:
    """Return once `condition` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


class Shelf:
    """Has every profile's static part at hand, or only after a while."""

    def __init__(self) -> None:
        self.available = asyncio.Event()
        self.available.set()

    async def token_ids(self, _static_profile_hash: str) -> list[int]:
        await self.available.wait()
        return [1, 2, 3]


@asynccontextmanager
async def working() -> AsyncIterator[Worker]:
    """Run a worker on the configured services."""
    configured = settings()
    keys, engine = KeyWrapper(configured.secrets.keys("master_key")), ScriptedEngine()
    codec = MessageCodec(Signer(configured.secrets.keys("signing_key")), keys)
    redis_keys = QueueKeys(configured.gateway.key_prefix)
    url = configured.gateway.request_queue_url
    database = Database(configured.database)
    async with AsyncRedis.from_url(url) as client:
        streams = StreamWriter(client, redis_keys.prefix, StreamingGroup(join_ms=1))
        runner = Runner(
            engine=engine,
            database=database,
            codec=codec,
            static_parts=cast("StaticParts", Shelf()),
            streams=streams,
            leases=Leases(client, redis_keys),
            worker="gpu@test",
            model="tiny",
            max_attempts=3,
            salt=b"salt" * 8,
            recheck=lambda _request_id: None,
        )
        sending = asyncio.create_task(streams.send_forever())
        with redis.Redis.from_url(url) as looking:
            worker = Worker(runner, engine, database, codec, keys, looking, redis_keys)
            try:
                yield worker
            finally:
                for task in (*worker.tasks, sending):
                    task.cancel()
                await asyncio.gather(*worker.tasks, sending, return_exceptions=True)
                await asyncio.to_thread(database.close)


def with_worker(work: Callable[[Worker], Coroutine[Any, Any, None]]) -> None:
    """Have a test work with a worker, on a loop of its own."""

    async def run() -> None:
        async with asyncio.timeout(2 * PATIENCE_S), working() as worker:
            await work(worker)

    asyncio.run(run())


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
        assert await worker.run(message)
        worker.check_end(message, "completed", None)
        result = worker.result(message)
        assert (result.text, result.finish_reason, result.model) == ("1 2 3 ", "stop", "tiny")
        assert (result.usage.prompt_tokens, result.usage.cached_tokens, result.usage.output_tokens) == (5, 4, 3)
        assert result.timings.prefill_ms == 250
        assert result.timings.first_token_ms is not None
        assert 500 <= result.timings.queued_ms <= result.timings.first_token_ms <= result.timings.total_ms
        assert worker.engine.asked[0].prompt_token_ids == [1, 2, 3, 7, 8]

    with_worker(work)


def test_several_choices() -> None:
    """They come mixed; each has its own text and its own end, in the order of choices."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        for number, choice in enumerate((2, 0, 1, 0, 2, 1), start=1):
            yield word(number, choice=choice, last=number > 3)

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        message = worker.message(n=3)
        assert await worker.run(message)
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
        assert not await worker.run(message)
        worker.check_end(message, "failed", "internal_error")

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
        assert not await task
        print(f"cancelled in {(time.monotonic() - began) * 1000:.0f} ms")
        assert worker.engine.running == {f"{other.job.request_id}-1"}
        worker.cancel(other)
        assert not await going_on
        for ended in (message, other):
            worker.check_end(ended, "cancelled", "cancelled")
            result = worker.result(ended)
            assert (result.text, result.finish_reasons, result.choices[0].finish_reason) == ("1 2 ", (), None)
            event = worker.terminal_event(ended)
            assert (event.prompt_tokens, event.cached_tokens, event.output_tokens) == (5, 4, 2)
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
        assert not await task
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
        assert not await task
        worker.check_end(message, "cancelled", "cancelled")
        assert worker.engine.asked == []

    with_worker(work)


def test_too_late_while_it_runs() -> None:
    """The deadline passes in the middle of the answer: it expires there and then, with what was said."""

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        deadline = now() + timedelta(seconds=1)
        message = worker.message(deadline=deadline)
        assert not await (await worker.running(message))
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
        assert await worker.run(message)
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
        await until(scope.limit.expired)
        assert worker.engine.running
        for _ in range(3):
            worker.cancel(message)
            await asyncio.sleep(0.01)
        assert not await task
        worker.check_end(message, first, first)

    with_worker(work)


def test_stopping_what_does_not_run_here() -> None:
    """Every worker hears of every cancelled request; most have nothing to do with it."""

    async def work(worker: Worker) -> None:
        done = worker.message()
        assert await worker.run(done)
        for request_id in (done.job.request_id, new_request_id(), "", "nonsense"):
            worker.runner.stop(request_id)
        other = worker.message()
        assert await worker.run(other)
        for message in (done, other):
            worker.check_end(message, "completed", None)

    with_worker(work)


@pytest.mark.parametrize("error", [TimeoutError(), EngineFailed(), ValueError("xyzzy")])
def test_an_engine_that_fails(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """The request failed, whatever the engine says about it: its own time limit is not the request's deadline."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield word(1)
        raise error

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        for deadline in (None, now() + timedelta(hours=1)):
            message = worker.message(deadline=deadline)
            assert not await worker.run(message)
            worker.check_end(message, "failed", getattr(error, "code", "internal_error"))

    with_worker(work)
    assert "xyzzy" not in caplog.text


def test_an_engine_that_fails_when_it_is_stopped() -> None:
    """Then it failed; there is one end, and the worker goes on."""

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
        assert not await task
        worker.check_end(message, "failed", "engine_failed")
        worker.engine.script = three_words
        assert await worker.run(worker.message())

    with_worker(work)


def test_an_engine_that_is_dead() -> None:
    """Nothing is recorded and nothing let go: another worker gets the message."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        yield word(1)
        raise EngineDead

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        message = worker.message()
        with pytest.raises(EngineDead):
            await worker.run(message)
        assert (worker.row(message).state, worker.is_leased(message)) == ("running", True)
        assert worker.runner.scopes == {}

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
        monkeypatch.setattr(worker_gpu.runner, "_DATABASE_RETRY_S", 0.05)
        await until(lambda: refused > 1)
        assert worker.engine.running == set()
        assert not worker.frames(message)[-1].terminal
        assert not await task
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
        assert await worker.run(answered)
        worker.cancel(cancelled)
        assert not await again
        assert await asyncio.gather(*lost) == [False, False]
        worker.check_end(answered, "completed", None)
        worker.check_end(cancelled, "cancelled", "cancelled")
        assert [worker.row(message).attempt for message in (answered, cancelled)] == [2, 2]
        assert worker.result(answered).text == "1 2 3 "

    with_worker(work)


@pytest.mark.parametrize("state", ["cancelled", "expired"])
def test_a_worker_that_died_before_it_told(state: Any) -> None:
    """What it recorded is the whole of what was said, and Redis has a part: the last frame must not come after that
    part, as if there were no more. Watchers read the rest in the database.
    """

    async def work(worker: Worker) -> None:
        worker.engine.script = endless
        message = worker.message()
        dying = await worker.running(message)
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        shown = worker.frames(message)
        attempt = lifecycle.Attempt(message.subject, lifecycle.FIRST_EPOCH, 1, "gpu@test")
        stored = Result.model_validate(
            {
                "pieces": [{"text": "1 2 "}, {"text": "3 "}],
                "finish_reasons": [],
                "model": "tiny",
                "usage": {"prompt_tokens": 5, "cached_tokens": 4, "output_tokens": 3},
                "timings": {"queued_ms": 1.0, "total_ms": 2.0},
            }
        )
        worker.database.write(lambda on: lifecycle.answer(on, attempt, stored, b"sealed", state))
        assert not await worker.run(message)
        assert worker.frames(message) == shown
        assert not worker.is_leased(message)

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
        assert not await worker.run(message)
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
        worker.runner.stop(message.job.request_id)

    async def work(worker: Worker) -> None:
        worker.engine.script = script
        messages = [worker.message() for _ in range(60)]
        cancelling = [cancel(worker, message) for message in messages]
        running = [worker.run(message) for message in messages]
        await asyncio.gather(*cancelling)
        answered = await asyncio.gather(*running)
        ends = [worker.row(message).state for message in messages]
        for message, state, succeeded in zip(messages, ends, answered, strict=True):
            assert succeeded == (state == "completed")
            if state == "completed":
                worker.check_end(message, state, None)
                assert worker.result(message).finish_reason == "stop"
            else:
                worker.check_end(message, "cancelled", "cancelled")
        print({state: ends.count(state) for state in set(ends)})
        assert set(ends) == {"completed", "cancelled"}

    with_worker(work)
