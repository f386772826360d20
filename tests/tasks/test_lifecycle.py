"""However workers die, wake up late and repeat themselves, a request has one end, and row and record agree on it.

The state machines let three workers, and clients that cancel and ask twice, do anything in any order, on SQLite, and
compare with models of a few lines. The explicit tests after them run on both databases, and on PostgreSQL also truly at
once.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, Literal, cast
from unittest import mock

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule
from sqlalchemy.engine import Connection, Engine

from tasks import lifecycle
from tasks.audit.events import Subject, ciphertext_hash
from tasks.db import create_engine, now
from tasks.errors import IdempotencyConflict
from tasks.idempotency import Idempotency, earlier_use, forget
from tasks.ids import new_request_id
from tasks.job import Piece, Result, Timings, Usage
from tasks.lifecycle import FIRST_EPOCH, Attempt, NotStarted
from tasks.migrating import upgrade
from tasks.schema import KINDS, TERMINAL_KINDS, TERMINAL_STATES, audit_events, idempotency_keys, requests
from tasks.settings import DatabaseGroup
from tests.services import PostgresServer, wait_until

MAX_ATTEMPTS = 4
WORKERS = ("gpu-1", "gpu-2", "gpu-3")
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
End = Literal["completed", "failed", "cancelled", "expired"]
Said = Literal["completed", "cancelled", "expired"]


def new_admission(
    organization: str = "acme", *, idempotency: Idempotency | None = None, **columns: Any
) -> lifecycle.Admission:
    """Return a request that governance allows."""
    return lifecycle.Admission(
        subject=Subject(new_request_id(), organization, "key_1", "incident-responder"),
        decision={"policy": "default_local_first", "project_id": "proj_1"},
        static_profile_hash="ab" * 32,
        data_key=b"wrapped",
        payload=b"sealed payload",
        columns={"api": "tasks", "priority": "normal", "deadline": None, **columns},
        idempotency=idempotency,
    )


def answer(text: str, state: str = "completed") -> Result:
    """Return a result with this text, whole or as far as it came."""
    return Result(
        pieces=(Piece(text=text),),
        finish_reasons=("stop",) if state == "completed" else (),
        model="tiny",
        usage=Usage(prompt_tokens=700, cached_tokens=640, output_tokens=5),
        timings=Timings(queued_ms=1.5, prefill_ms=None, first_token_ms=30.5, total_ms=99.75),
    )


def row_of(connection: Connection, request_id: str) -> sa.Row[Any]:
    """Return a request's row."""
    return connection.execute(sa.select(requests).where(requests.c.request_id == request_id)).one()


def events_of(connection: Connection, request_id: str) -> list[sa.Row[Any]]:
    """Return a request's events, in the order in which they can happen."""
    rows = connection.execute(sa.select(audit_events).where(audit_events.c.request_id == request_id))
    return sorted(rows, key=lambda row: (KINDS.index(row.kind), row.attempt))


def raise_epoch(connection: Connection, request_id: str) -> None:
    """Do what publishing again does to the row of a request that has not ended."""
    connection.execute(
        sa.update(requests)
        .where(requests.c.request_id == request_id, requests.c.state.not_in(TERMINAL_STATES))
        .values(epoch=requests.c.epoch + 1)
    )


# --- Anything in any order ------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """A database of its own, and a clock that only moves when it is told to."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="metaqore-lifecycle-"))
        shutil.copy(self.template, self.folder / "gateway.db")
        self.engine = create_engine(DatabaseGroup(url=f"sqlite:///{self.folder / 'gateway.db'}"))
        # No power failure is part of this, and waiting for the disk would be most of the time.
        sa.event.listen(self.engine, "connect", lambda driver, _record: driver.execute("PRAGMA synchronous=OFF"))
        self.connection = self.engine.connect()
        self.time = NOON
        self.clocks = [mock.patch(f"tasks.{module}.now", self.now) for module in ("lifecycle", "idempotency")]
        for clock in self.clocks:
            clock.start()

    def now(self) -> datetime:
        """Return what time it is here."""
        return self.time

    def teardown(self) -> None:
        """Remove the run's database, and give the module its clock back."""
        for clock in self.clocks:
            clock.stop()
        self.connection.close()
        self.engine.dispose()
        shutil.rmtree(self.folder)

    def do(self, work: Callable[[Connection], Any]) -> Any:
        """Run one write as the writer thread does."""
        with self.connection.begin():
            return work(self.connection)


@dataclass
class Model:
    """What a request must be: a few lines that are obviously right."""

    deadline: datetime | None = None
    state: str = "queued"
    epoch: int = FIRST_EPOCH
    attempt: int = 0
    code: str | None = None
    result: bytes | None = None
    ended_by: tuple[int, int] | None = None
    cancel_requested: bool = False
    starts: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL_STATES

    def end(self, state: str, code: str | None, result: bytes | None = None) -> None:
        self.state, self.code, self.result, self.ended_by = state, code, result, (self.epoch, self.attempt)

    def start(self, epoch: int, worker: str, at: datetime) -> Literal["begun", "refused", "ended"]:
        if self.ended or epoch != self.epoch:
            return "refused"
        if self.cancel_requested:
            self.end("cancelled", "cancelled")
        elif self.deadline is not None and self.deadline <= at:
            self.end("expired", "expired")
        elif self.attempt >= MAX_ATTEMPTS:
            self.end("failed", "attempts_exhausted")
        else:
            self.state, self.attempt = "running", self.attempt + 1
            self.starts.append((self.epoch, self.attempt, worker))
            return "begun"
        return "ended"

    def finish(self, attempt: Attempt, state: str, code: str | None, result: bytes | None) -> bool:
        if (attempt.epoch, attempt.number) != (self.epoch, self.attempt):
            return False
        if self.ended:
            return (self.state, self.code) == (state, code)
        self.end(state, code, result)
        return True

    def cancel(self) -> None:
        if self.state == "queued":
            self.end("cancelled", "cancelled")
        elif not self.ended:
            self.cancel_requested = True

    def expire(self, at: datetime) -> None:
        if self.state == "queued" and self.deadline is not None and self.deadline <= at:
            self.end("expired", "expired")


class Lifecycle(Machine):
    """One request, three workers, a gateway that publishes again or gives up, and a client that may cancel."""

    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.numbers: list[int] = []

    @initialize(target=attempts, hours=st.sampled_from([None, 1, 3]))
    def admit(self, hours: int | None) -> Attempt:
        """Admit the request. The gateway may end it as attempt 0, if it cannot be published."""
        self.model.deadline = None if hours is None else NOON + timedelta(hours=hours)
        admission = new_admission(deadline=self.model.deadline)
        self.subject = admission.subject
        assert self.do(lambda connection: lifecycle.admit(connection, admission)) == self.subject.request_id
        return Attempt(self.subject, FIRST_EPOCH, 0)

    @rule(target=attempts, worker=st.sampled_from(WORKERS), behind=st.sampled_from([0, 0, 0, 0, 1, -1]))
    def start(self, worker: str, behind: int) -> Any:
        """A worker gets a message, perhaps one of another epoch."""
        model = self.model
        epoch = model.epoch - behind
        expected = model.start(epoch, worker, self.time)
        started = self.do(
            lambda connection: lifecycle.start(connection, self.subject.request_id, epoch, worker, MAX_ATTEMPTS)
        )
        if expected == "begun":
            assert started == Attempt(self.subject, epoch, model.attempt, worker, model.deadline)
            self.numbers.append(started.number)
            return started
        assert started == NotStarted(model.state, model.attempt, model.code, model.result is not None)
        assert expected == "refused" or model.ended
        return multiple()

    @rule(
        attempt=attempts,
        text=st.sampled_from(["one", "two"]),
        state=st.sampled_from(["completed", "cancelled", "expired"]),
    )
    def answer(self, attempt: Attempt, text: str, state: Said) -> None:
        """An attempt, however old, says that it has an answer, or what it had said when it was stopped."""
        sealed = text.encode()
        expected = self.model.finish(attempt, state, None if state == "completed" else state, sealed)
        given = self.do(lambda c: lifecycle.answer(c, attempt, answer(text, state), sealed, state))
        assert given == expected

    @rule(
        attempt=attempts,
        state=st.sampled_from(["failed", "cancelled", "expired"]),
        code=st.sampled_from([None, "engine_failed"]),
    )
    def finish(self, attempt: Attempt, state: End, code: str | None) -> None:
        """An attempt, however old, says that it ended without an answer."""
        expected = self.model.finish(attempt, state, code, None)
        given = self.do(lambda connection: lifecycle.finish(connection, attempt, state, code=code))
        assert given == expected

    @rule(attempt=attempts, text=st.sampled_from(["one", "two"]))
    def answer_without_hearing_of_it(self, attempt: Attempt, text: str) -> None:
        """An attempt says the same three times, as after a commit whose answer was lost: each answer is the same."""
        sealed = text.encode()
        expected = self.model.finish(attempt, "completed", None, sealed)
        for _ in range(3):
            assert self.do(lambda c: lifecycle.answer(c, attempt, answer(text), sealed)) == expected

    @rule(organization=st.sampled_from(["acme", "acme", "globex"]))
    def cancel(self, organization: str) -> None:
        """A client cancels: a queued request ends, a running one is marked, and of others' there is nothing to see."""
        before = self.model.state
        row = self.do(lambda c: lifecycle.cancel(c, self.subject.request_id, organization))
        if organization == "acme":
            self.model.cancel()
            assert row.state == before
        else:
            assert row is None

    @rule(minutes=st.sampled_from([1, 59, 60, 120]))
    def pass_time(self, minutes: int) -> None:
        """Time passes, perhaps up to the very instant of the deadline."""
        self.time += timedelta(minutes=minutes)

    @rule()
    def expire(self) -> None:
        """Somebody looks at the request and finds that nobody took it in time, or that it is none of that."""
        self.do(lambda connection: lifecycle.expire(connection, self.subject.request_id))
        self.model.expire(self.time)

    @rule()
    def publish_again(self) -> None:
        """The gateway publishes the request anew, which fences off whoever runs it."""
        if not self.model.ended:
            self.model.epoch += 1
        self.do(lambda connection: raise_epoch(connection, self.subject.request_id))

    @rule(attempt=attempts)
    def fail_in_the_middle(self, attempt: Attempt) -> None:
        """A transaction that is rolled back has changed neither the row nor the record."""
        with self.connection.begin() as transaction:
            lifecycle.finish(self.connection, attempt, "failed", code="engine_failed")
            lifecycle.cancel(self.connection, self.subject.request_id, "acme")
            transaction.rollback()

    @invariant()
    def row_and_record_are_the_models(self) -> None:
        """The row is the model's; the record has each start once, and one terminal event if the request has ended."""
        model = self.model
        with self.connection.begin():
            row = row_of(self.connection, self.subject.request_id)
            events = events_of(self.connection, self.subject.request_id)
            to_stop = lifecycle.to_stop(self.connection, [self.subject.request_id, new_request_id()])
        assert (row.state, row.epoch, row.attempt, row.error_code, row.result) == (
            model.state, model.epoch, model.attempt, model.code, model.result,
        )  # fmt: skip
        assert row.worker == (model.starts[-1][2] if model.starts else None)
        assert (row.finished_at is not None) == model.ended
        assert (row.cancel_requested_at is not None) == model.cancel_requested
        assert to_stop == [self.subject.request_id] * model.cancel_requested
        started = [(event.epoch, event.attempt, event.worker) for event in events if event.kind == "started"]
        assert started == model.starts
        assert self.numbers == sorted(set(self.numbers)) == list(range(1, len(self.numbers) + 1))
        terminal = [event for event in events if event.kind in TERMINAL_KINDS]
        assert len(terminal) == int(model.ended)
        if model.ended:
            end = terminal[0]
            assert (end.kind, end.code, (end.epoch, end.attempt)) == (model.state, model.code, model.ended_by)
            assert end.occurred_at == row.finished_at
            hashed = None if model.result is None else ciphertext_hash(model.result)
            assert end.payload_sha256 == hashed
        assert [event.kind for event in events[:2]] == ["received", "admitted"]


class Idempotent(Machine):
    """Clients of two organizations that use three keys, now for this body and now for that."""

    def __init__(self) -> None:
        super().__init__()
        #: Which request holds a key: its body, its id, and when it was admitted.
        self.held: dict[tuple[str, str], tuple[str, str, datetime]] = {}
        self.admitted: list[str] = []

    @rule(organization=st.sampled_from(["acme", "globex"]), key=st.sampled_from("abc"), body=st.sampled_from("xxy"))
    def ask(self, organization: str, key: str, body: str) -> None:
        """The same key and body give the same request, the same key and another body give an error, else it is new."""
        admission = new_admission(organization, idempotency=idempotency(key, body))
        held = self.held.get((organization, key))
        if held is None or self.time - held[2] > timedelta(hours=24):
            assert self.do(lambda c: lifecycle.admit(c, admission)) == admission.subject.request_id
            self.held[organization, key] = (body, admission.subject.request_id, self.time)
            self.admitted.append(admission.subject.request_id)
        elif held[0] == body:
            assert self.do(lambda c: lifecycle.admit(c, admission)) == held[1]
        else:
            with pytest.raises(IdempotencyConflict):
                self.do(lambda c: lifecycle.admit(c, admission))

    @rule()
    def ask_without_a_key(self) -> None:
        """Who gives no key gets a request of its own each time."""
        admission = new_admission()
        assert self.do(lambda c: lifecycle.admit(c, admission)) == admission.subject.request_id
        self.admitted.append(admission.subject.request_id)

    @rule(hours=st.sampled_from([1, 23, 24]), seconds=st.sampled_from([0, 1]))
    def pass_time(self, hours: int, seconds: int) -> None:
        """Time passes, perhaps a day, or a second more."""
        self.time += timedelta(hours=hours, seconds=seconds)

    @precondition(lambda self: self.held)
    @rule(choose=st.randoms(use_true_random=False), organization=st.sampled_from([None, "initech"]))
    def forget(self, choose: Random, organization: str | None) -> None:
        """A request could not be queued: its key is free again. Another organization cannot free it."""
        owner, key = choose.choice(sorted(self.held))
        request_id = self.held[owner, key][1]
        self.do(lambda c: forget(c, request_id, organization or owner))
        if organization is None:
            del self.held[owner, key]

    @invariant()
    def one_request_a_use(self) -> None:
        """There is a row for each request that was taken, with its two events, and none for one that was repeated."""
        with self.connection.begin():
            rows = self.connection.execute(sa.select(requests.c.request_id)).scalars().all()
            events = self.connection.execute(sa.select(sa.func.count()).select_from(audit_events)).scalar_one()
            keys = self.connection.execute(sa.select(sa.func.count()).select_from(idempotency_keys)).scalar_one()
        assert sorted(rows) == sorted(self.admitted)
        assert events == 2 * len(self.admitted)
        assert keys <= len(self.held)


def idempotency(key: str, body: str) -> Idempotency:
    """Return what is remembered of a key and a body."""
    return Idempotency(key.encode() * 32, body.encode() * 32)


@pytest.mark.parametrize("machine", [Lifecycle, Idempotent])
def test_anything_in_any_order(sqlite_template: Path, machine: type[Machine]) -> None:
    """At most one terminal event; the row is as the model; attempts grow; who is fenced off changes nothing. One
    request for each use of an idempotency key.
    """
    Machine.template = sqlite_template
    case = machine.TestCase
    case.settings = settings(
        max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    case().runTest()


# --- One by one, on both databases ----------------------------------------------------------------


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(
    request: pytest.FixtureRequest, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Return an engine on a migrated database, which the tests share: each has requests of its own."""
    if request.param == "sqlite":
        path = shutil.copy(sqlite_template, tmp_path_factory.mktemp("lifecycle"))
        url = f"sqlite:///{path}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.migrated_url(upgrade)
    engine = create_engine(DatabaseGroup(url=url))
    yield engine
    engine.dispose()


class Request:
    """One admitted request, and what may be done to it, each in a transaction of its own."""

    def __init__(self, engine: Engine, **columns: Any) -> None:
        self.engine = engine
        admission = new_admission(**columns)
        self.subject = admission.subject
        self.id = self.subject.request_id
        self.do(lambda connection: lifecycle.admit(connection, admission))

    def do(self, work: Callable[[Connection], Any]) -> Any:
        """Run a write as the writer thread does."""
        with self.engine.execution_options(immediate=True).begin() as connection:
            return work(connection)

    def start(self, worker: str = "gpu-1", epoch: int = FIRST_EPOCH, most: int = 3) -> Attempt | NotStarted:
        """Begin an attempt."""
        started: Attempt | NotStarted = self.do(
            lambda connection: lifecycle.start(connection, self.id, epoch, worker, most)
        )
        return started

    def begun(self, worker: str = "gpu-1", epoch: int = FIRST_EPOCH) -> Attempt:
        """Begin an attempt that is allowed."""
        started = self.start(worker, epoch)
        assert isinstance(started, Attempt)
        return started

    def answer(self, attempt: Attempt, text: str = "one", state: Said = "completed") -> bool:
        """Record an answer."""
        return bool(self.do(lambda c: lifecycle.answer(c, attempt, answer(text, state), text.encode(), state)))

    def finish(self, attempt: Attempt, state: End, code: str | None = None) -> bool:
        """Record another end."""
        return bool(self.do(lambda connection: lifecycle.finish(connection, attempt, state, code=code)))

    def cancel(self, organization: str = "acme") -> sa.Row[Any] | None:
        """Ask for its end; return the row as it was before."""
        row: sa.Row[Any] | None = self.do(lambda connection: lifecycle.cancel(connection, self.id, organization))
        return row

    def expire(self) -> None:
        """Look whether anybody took it in time."""
        self.do(lambda connection: lifecycle.expire(connection, self.id))

    @property
    def row(self) -> sa.Row[Any]:
        """Return the request's row."""
        return self.do(lambda connection: row_of(connection, self.id))  # type: ignore[no-any-return]

    @property
    def kinds(self) -> list[str]:
        """Return what was recorded, in order."""
        return [event.kind for event in self.do(lambda connection: events_of(connection, self.id))]


def test_admission_is_recorded_with_what_was_stored(engine: Engine) -> None:
    """The event commits to the stored ciphertext."""
    request = Request(engine)
    row = request.row
    assert (row.state, row.epoch, row.attempt, row.worker) == ("queued", 1, 0, None)
    assert request.kinds == ["received", "admitted"]
    admitted = request.do(lambda connection: events_of(connection, request.id))[1]
    assert admitted.payload_sha256 == ciphertext_hash(row.payload)
    assert admitted.policy == "default_local_first"
    assert (row.api, row.priority, row.project_id, row.deadline) == ("tasks", "normal", "proj_1", None)


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
    request.do(lambda connection: raise_epoch(connection, request.id))
    assert request.start("gpu-2", FIRST_EPOCH) == NotStarted("running", 1, None)
    assert request.start("gpu-2", FIRST_EPOCH + 2) == NotStarted("running", 1, None)
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
    """After the last allowed start the request fails, once; then all agree, and the lost attempts change nothing."""
    request = Request(engine)
    attempts = [request.begun(worker) for worker in WORKERS]
    for _ in range(2):
        assert request.start() == NotStarted("failed", 3, "attempts_exhausted")
    row = request.row
    assert (row.state, row.error_code, row.attempt) == ("failed", "attempts_exhausted", 3)
    assert [request.answer(attempt) for attempt in attempts] == [False] * 3
    assert request.kinds == ["received", "admitted", *["started"] * 3, "failed"]


def test_a_request_that_could_not_be_published(engine: Engine) -> None:
    """The gateway ends it as attempt 0; a message that arrived all the same is refused."""
    request = Request(engine)
    assert request.finish(Attempt(request.subject, FIRST_EPOCH, 0), "failed", "queue_unavailable")
    assert request.start() == NotStarted("failed", 0, "queue_unavailable")
    assert request.kinds == ["received", "admitted", "failed"]


def test_a_request_that_was_published_and_seemed_not_to_be(engine: Engine) -> None:
    """A worker was quicker than the gateway's verdict: the worker's attempt counts."""
    request = Request(engine)
    attempt = request.begun()
    assert not request.finish(Attempt(request.subject, FIRST_EPOCH, 0), "failed", "queue_unavailable")
    assert request.answer(attempt)
    assert "failed" not in request.kinds


def test_requests_belong_to_their_organization(engine: Engine) -> None:
    """Another organization finds nothing."""
    request = Request(engine)
    assert request.do(lambda connection: lifecycle.find(connection, request.id, "acme")).request_id == request.id

    def found_by(organization: str) -> Any:
        return request.do(lambda connection: lifecycle.find(connection, request.id, organization))

    assert [found_by(organization) for organization in ("globex", "", "ACME")] == [None] * 3


def test_an_end_that_is_no_state(engine: Engine) -> None:
    """The database refuses it, and the whole transaction with it."""
    request = Request(engine)
    attempt = request.begun()
    for state in ("vetoed", "queued ", "nonsense"):
        with pytest.raises(sa.exc.IntegrityError):
            request.finish(attempt, cast("End", state))
    assert request.row.state == "running"
    assert request.answer(attempt)


# --- Cancelling and deadlines ---------------------------------------------------------------------


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
    assert request.do(lambda connection: lifecycle.to_stop(connection, ids)) == [request.id]
    assert request.answer(attempt, "half", "cancelled")
    row = request.row
    assert (row.state, row.error_code, row.result) == ("cancelled", "cancelled", b"half")
    ended = request.do(lambda connection: events_of(connection, request.id))[-1]
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
    request.do(
        lambda c: c.execute(
            sa.update(requests).where(requests.c.request_id == request.id).values(deadline=now() - timedelta(seconds=1))
        )
    )
    assert request.start("gpu-2") == NotStarted("expired", 1, "expired")
    assert request.kinds == ["received", "admitted", "started", "expired"]


def test_what_was_cancelled_and_is_too_late_was_cancelled(engine: Engine) -> None:
    """Somebody said so first."""
    request = Request(engine, deadline=now() + timedelta(seconds=0.05))
    request.begun()
    request.cancel()
    wait_until(lambda: now() > request.row.deadline, 5, "the deadline")
    assert request.start("gpu-2") == NotStarted("cancelled", 1, "cancelled")


def test_only_what_waits_and_is_too_late_expires(engine: Engine) -> None:
    """Looking at requests ends no other one: not those with time, those without a deadline, those that run."""
    past, future = now() - timedelta(seconds=1), now() + timedelta(hours=1)
    running = Request(engine, deadline=future)
    running.begun()
    running.do(
        lambda c: c.execute(sa.update(requests).where(requests.c.request_id == running.id).values(deadline=past))
    )
    others = [Request(engine), Request(engine, deadline=future), Request(engine, deadline=past)]
    for request in (running, *others, others[-1]):
        request.expire()
    assert [request.row.state for request in (running, *others)] == ["running", "queued", "queued", "expired"]
    assert others[-1].kinds == ["received", "admitted", "expired"]
    others[0].do(lambda connection: lifecycle.expire(connection, new_request_id()))


# --- Asking twice ---------------------------------------------------------------------------------


def admit(engine: Engine, admission: lifecycle.Admission) -> str:
    """Admit a request as the writer thread does, and once more if the database refused it, as the pipeline does."""
    for last in (False, True):
        try:
            with engine.execution_options(immediate=True).begin() as connection:
                return lifecycle.admit(connection, admission)
        except sa.exc.IntegrityError:
            if last:
                raise
    raise AssertionError


def test_the_same_key_and_body_are_the_same_request(engine: Engine) -> None:
    """Nothing is stored the second time; another body is refused; of other organizations' keys nobody knows."""
    organization = new_request_id()
    first = new_admission(organization, idempotency=idempotency("a", "x"))
    assert admit(engine, first) == first.subject.request_id
    assert admit(engine, new_admission(organization, idempotency=idempotency("a", "x"))) == first.subject.request_id
    with pytest.raises(IdempotencyConflict):
        admit(engine, new_admission(organization, idempotency=idempotency("a", "y")))
    for other in (
        new_admission(organization, idempotency=idempotency("b", "x")),
        new_admission(organization),
        new_admission(new_request_id(), idempotency=idempotency("a", "y")),
    ):
        assert admit(engine, other) == other.subject.request_id
    with engine.connect() as connection:
        assert len(lifecycle.page(connection, organization, {}, None, 100)) == 3


def test_a_key_is_free_again_after_a_day_or_when_it_is_forgotten(engine: Engine) -> None:
    """To the second; and what is older than a day is cleared away, of whatever organization."""
    organization = new_request_id()
    ids = []
    for key, age in (("a", timedelta(hours=23, minutes=59)), ("b", timedelta(hours=24, seconds=1))):
        admission = new_admission(organization, idempotency=idempotency(key, "x"))
        ids.append(admit(engine, admission))
        with engine.execution_options(immediate=True).begin() as connection:
            connection.execute(
                sa.update(idempotency_keys)
                .where(idempotency_keys.c.request_id == ids[-1])
                .values(created_at=now() - age)
            )
    assert admit(engine, new_admission(organization, idempotency=idempotency("a", "x"))) == ids[0]
    with engine.connect() as connection:
        kept = connection.execute(sa.select(idempotency_keys.c.request_id)).scalars().all()
        assert (ids[0] in kept, ids[1] in kept) == (True, False)
        assert earlier_use(connection, organization, idempotency("b", "x")) is None
    assert admit(engine, new_admission(organization, idempotency=idempotency("b", "y"))) not in ids
    with engine.execution_options(immediate=True).begin() as connection:
        forget(connection, ids[0], "somebody else")
        assert earlier_use(connection, organization, idempotency("a", "x")) is not None
        forget(connection, ids[0], organization)
    assert admit(engine, new_admission(organization, idempotency=idempotency("a", "y"))) not in ids


def test_a_refused_admission_uses_up_no_key(engine: Engine) -> None:
    """Where the transaction fails, the key is as free as before."""
    organization = new_request_id()
    taken = Request(engine)
    broken = replace(new_admission(organization, idempotency=idempotency("a", "x")), subject=taken.subject)
    broken = replace(broken, subject=replace(taken.subject, organization=organization))
    with pytest.raises(sa.exc.IntegrityError):
        admit(engine, broken)
    good = new_admission(organization, idempotency=idempotency("a", "y"))
    assert admit(engine, good) == good.subject.request_id


@pytest.mark.parametrize("bodies", ["xxxxxxxx", "xyxyxyxy"])
def test_asking_at_once(engine: Engine, bodies: str) -> None:
    """Of eight that use one key at once, one is taken; the others get its id, or the conflict if they say otherwise."""
    organization = new_request_id()
    barrier = threading.Barrier(len(bodies))

    def ask(body: str) -> str | None:
        admission = new_admission(organization, idempotency=idempotency("a", body))
        barrier.wait(30)
        try:
            return admit(engine, admission)
        except IdempotencyConflict:
            return None

    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(ask, bodies))
    with engine.connect() as connection:
        [row] = lifecycle.page(connection, organization, {}, None, 100)
    won = bodies[answers.index(row.request_id)]
    assert answers == [row.request_id if body == won else None for body in bodies]


# --- Lists ----------------------------------------------------------------------------------------


def test_a_page_is_the_newest_of_an_organization(engine: Engine) -> None:
    """From the newest to the oldest, page by page, with those that fit and nobody else's."""
    organization = new_request_id()
    made = [Request(engine, organization=organization, priority=word) for word in ("low", "high", "low", "low")]
    Request(engine)
    ids = [request.id for request in reversed(made)]

    def page(after: str | None = None, limit: int = 10, **filters: str) -> list[str]:
        with engine.connect() as connection:
            return [row.request_id for row in lifecycle.page(connection, organization, filters, after, limit)]

    assert page() == ids
    assert page(limit=3) == ids[:3]
    assert page(after=ids[1], limit=1) == [ids[2]]
    assert page(after=ids[-1]) == []
    assert page(priority="low") == [ids[0], ids[1], ids[3]]
    assert page(priority="low", state="queued", after=ids[0], limit=1) == [ids[1]]
    assert page(state="running") == []


# --- At once --------------------------------------------------------------------------------------


def test_starts_at_once(engine: Engine) -> None:
    """Eight workers that get the same message at once: three begin, with numbers of their own; then it has failed."""
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
    assert refused == [NotStarted("failed", 3, "attempts_exhausted")] * 5
    assert request.kinds.count("failed") == 1


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
    """Who cancels finds it running, and waits for the row, in which its worker just records the answer."""
    request = Request(engine)
    attempt = request.begun()
    with ThreadPoolExecutor(1) as threads:
        with engine.begin() as connection:
            assert lifecycle.answer(connection, attempt, answer("one"), b"one")
            cancelling = threads.submit(request.cancel)
            wait_until(_waiting_for_a_lock(engine), 10, "the cancelling to wait for the row")
        before = cancelling.result(30)
    assert before is not None
    assert before.state == "running"
    assert (request.row.state, request.row.cancel_requested_at) == ("completed", None)


@pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
def test_a_request_that_is_taken_while_it_is_cancelled_is_marked(engine: Engine) -> None:
    """Who cancels finds it queued, and waits for the row, in which a worker just begins it: so the worker has to end it."""
    request = Request(engine)
    with ThreadPoolExecutor(1) as threads:
        with engine.begin() as connection:
            assert isinstance(lifecycle.start(connection, request.id, FIRST_EPOCH, "gpu-1", 3), Attempt)
            cancelling = threads.submit(request.cancel)
            wait_until(_waiting_for_a_lock(engine), 10, "the cancelling to wait for the row")
        cancelling.result(30)
    assert (request.row.state, request.row.cancel_requested_at is not None) == ("running", True)
    assert request.kinds == ["received", "admitted", "started"]
