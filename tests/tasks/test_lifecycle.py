"""However workers die, wake up late and repeat themselves, a request has one end, and row and record agree on it.

The state machine lets three workers do anything in any order, on SQLite, and compares with a model of a few lines. The
explicit tests after it run on both databases, and on PostgreSQL also truly at once.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy.engine import Connection, Engine

from tasks import lifecycle
from tasks.audit.events import Subject, ciphertext_hash
from tasks.db import create_engine
from tasks.ids import new_request_id
from tasks.job import Result, Timings, Usage
from tasks.lifecycle import FIRST_EPOCH, Attempt, NotStarted
from tasks.migrating import upgrade
from tasks.schema import KINDS, TERMINAL_KINDS, TERMINAL_STATES, audit_events, requests
from tasks.settings import DatabaseGroup
from tests.services import PostgresServer, wait_until

MAX_ATTEMPTS = 4
WORKERS = ("gpu-1", "gpu-2", "gpu-3")
End = Literal["completed", "failed", "cancelled", "expired"]


def new_admission() -> lifecycle.Admission:
    """Return a request that governance allows."""
    subject = Subject(new_request_id(), "acme", "key_1", "incident-responder")
    return lifecycle.Admission(subject, {"policy": "default_local_first"}, "ab" * 32, b"wrapped", b"sealed payload")


def answer(text: str) -> Result:
    """Return a result with this text."""
    return Result(
        text=text,
        cuts=(len(text),),
        finish_reason="stop",
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


@pytest.fixture(scope="module")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a migrated SQLite database to copy: migrating anew would be most of a run's time."""
    path = tmp_path_factory.mktemp("template") / "gateway.db"
    upgrade(f"sqlite:///{path}")
    return path


# --- Anything in any order ------------------------------------------------------------------------


@dataclass
class Model:
    """What a request must be: a few lines that are obviously right."""

    state: str = "queued"
    epoch: int = FIRST_EPOCH
    attempt: int = 0
    code: str | None = None
    result: bytes | None = None
    ended_by: tuple[int, int] | None = None
    starts: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL_STATES

    def start(self, epoch: int, worker: str) -> Literal["begun", "refused", "exhausted"]:
        if self.ended or epoch != self.epoch:
            return "refused"
        if self.attempt >= MAX_ATTEMPTS:
            self.state, self.code, self.ended_by = "failed", "attempts_exhausted", (self.epoch, self.attempt)
            return "exhausted"
        self.state, self.attempt = "running", self.attempt + 1
        self.starts.append((self.epoch, self.attempt, worker))
        return "begun"

    def finish(self, attempt: Attempt, state: str, code: str | None, result: bytes | None) -> bool:
        own = (attempt.epoch, attempt.number)
        if own != (self.epoch, self.attempt):
            return False
        if self.ended:
            return (self.state, self.code) == (state, code)
        self.state, self.code, self.result, self.ended_by = state, code, result, own
        return True


class Lifecycle(RuleBasedStateMachine):
    """One request, three workers, and a gateway that publishes again or gives up."""

    template: Path
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="metaqore-lifecycle-"))
        shutil.copy(self.template, self.folder / "gateway.db")
        self.engine = create_engine(DatabaseGroup(url=f"sqlite:///{self.folder / 'gateway.db'}"))
        # No power failure is part of this, and waiting for the disk would be most of the time.
        sa.event.listen(self.engine, "connect", lambda driver, _record: driver.execute("PRAGMA synchronous=OFF"))
        self.connection = self.engine.connect()
        self.model = Model()
        self.numbers: list[int] = []

    def teardown(self) -> None:
        """Remove the run's database."""
        self.connection.close()
        self.engine.dispose()
        shutil.rmtree(self.folder)

    def do(self, work: Callable[[Connection], Any]) -> Any:
        """Run one write as the writer thread does."""
        with self.connection.begin():
            return work(self.connection)

    @initialize(target=attempts)
    def admit(self) -> Attempt:
        """Admit the request. The gateway may end it as attempt 0, if it cannot be published."""
        admission = new_admission()
        self.subject = admission.subject
        self.do(lambda connection: lifecycle.admit(connection, admission))
        return Attempt(self.subject, FIRST_EPOCH, 0)

    @rule(target=attempts, worker=st.sampled_from(WORKERS), behind=st.sampled_from([0, 0, 0, 0, 1, -1]))
    def start(self, worker: str, behind: int) -> Any:
        """A worker gets a message, perhaps one of another epoch."""
        epoch = self.model.epoch - behind
        before = (self.model.state, self.model.attempt, self.model.code)
        expected = self.model.start(epoch, worker)
        started = self.do(
            lambda connection: lifecycle.start(connection, self.subject.request_id, epoch, worker, MAX_ATTEMPTS)
        )
        if expected == "begun":
            assert started == Attempt(self.subject, epoch, self.model.attempt, worker)
            self.numbers.append(started.number)
            return started
        if expected == "exhausted":
            assert started == NotStarted("failed", self.model.attempt, "attempts_exhausted")
        else:
            assert started == NotStarted(*before)
        return multiple()

    @rule(attempt=attempts, text=st.sampled_from(["one", "two"]))
    def complete(self, attempt: Attempt, text: str) -> None:
        """An attempt, however old, says that it has an answer."""
        sealed = text.encode()
        expected = self.model.finish(attempt, "completed", None, sealed)
        given = self.do(lambda connection: lifecycle.complete(connection, attempt, answer(text), sealed))
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
    def complete_without_hearing_of_it(self, attempt: Attempt, text: str) -> None:
        """An attempt says the same three times, as after a commit whose answer was lost: each answer is the same."""
        sealed = text.encode()
        expected = self.model.finish(attempt, "completed", None, sealed)
        for _ in range(3):
            assert self.do(lambda c: lifecycle.complete(c, attempt, answer(text), sealed)) == expected

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
            transaction.rollback()

    @invariant()
    def row_and_record_are_the_models(self) -> None:
        """The row is the model's; the record has each start once, and one terminal event if the request has ended."""
        model = self.model
        with self.connection.begin():
            row = row_of(self.connection, self.subject.request_id)
            events = events_of(self.connection, self.subject.request_id)
        assert (row.state, row.epoch, row.attempt, row.error_code, row.result) == (
            model.state, model.epoch, model.attempt, model.code, model.result,
        )  # fmt: skip
        assert row.worker == (model.starts[-1][2] if model.starts else None)
        assert (row.finished_at is not None) == model.ended
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


def test_anything_in_any_order(sqlite_template: Path) -> None:
    """At most one terminal event; the row is as the model; attempts grow; who is fenced off changes nothing."""
    Lifecycle.template = sqlite_template
    machine = Lifecycle.TestCase
    machine.settings = settings(
        max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    machine().runTest()


# --- One by one, on both databases ----------------------------------------------------------------


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, sqlite_template: Path) -> Iterator[Engine]:
    """Return an engine on a migrated database, which the tests share: each has requests of its own."""
    if request.param == "sqlite":
        url = f"sqlite:///{sqlite_template}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.url(server.create_database())
        upgrade(url)
    engine = create_engine(DatabaseGroup(url=url))
    yield engine
    engine.dispose()


class Request:
    """One admitted request, and what may be done to it, each in a transaction of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        admission = new_admission()
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

    def complete(self, attempt: Attempt, text: str = "one") -> bool:
        """Record an answer."""
        return bool(self.do(lambda connection: lifecycle.complete(connection, attempt, answer(text), text.encode())))

    def finish(self, attempt: Attempt, state: End, code: str | None = None) -> bool:
        """Record another end."""
        return bool(self.do(lambda connection: lifecycle.finish(connection, attempt, state, code=code)))

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


def test_an_admission_is_whole_or_not_at_all(engine: Engine) -> None:
    """The same id a second time changes nothing, although the row comes before the events."""
    request = Request(engine)
    again = lifecycle.Admission(request.subject, {}, "cd" * 32, b"other", b"other")
    with pytest.raises(sa.exc.IntegrityError):
        request.do(lambda connection: lifecycle.admit(connection, again))
    assert request.row.payload == b"sealed payload"
    assert request.kinds == ["received", "admitted"]


def test_the_answer_of_the_second_attempt(engine: Engine) -> None:
    """The first worker was given up for lost; what it says later changes nothing."""
    request = Request(engine)
    lost, second = request.begun("gpu-1"), request.begun("gpu-2")
    assert (lost.number, second.number) == (1, 2)
    assert not request.complete(lost, "late")
    assert not request.finish(lost, "failed")
    assert request.complete(second)
    assert not request.complete(lost, "later")
    row = request.row
    assert (row.state, row.attempt, row.worker, row.result) == ("completed", 2, "gpu-2", b"one")
    assert request.kinds == ["received", "admitted", "started", "started", "completed"]


def test_repeating_ones_own_end(engine: Engine) -> None:
    """True each time, recorded once, and the first answer stays."""
    request = Request(engine)
    attempt = request.begun()
    assert [request.complete(attempt, text) for text in ("one", "two", "one")] == [True] * 3
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
    assert not request.complete(old, "late")
    assert not request.finish(old, "failed")
    new = request.begun("gpu-2", FIRST_EPOCH + 1)
    assert new.number == 2
    assert request.complete(new)
    assert not request.complete(old)


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
    assert [request.complete(attempt) for attempt in attempts] == [False] * 3
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
    assert request.complete(attempt)
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
    assert request.complete(attempt)


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
        return request.complete(attempt) if state == "completed" else request.finish(attempt, state)

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(finish, ends))
    state = request.row.state
    assert [kind for kind in request.kinds if kind in TERMINAL_KINDS] == [state]
    assert answers == [end == state for end in ends]


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
            assert lifecycle.complete(connection, attempt, answer("one"), b"one")
            starting: Future[Attempt | NotStarted] = threads.submit(request.start, "gpu-9")
            wait_until(_waiting_for_a_lock(engine), 10, "the second delivery to wait for the row")
        outcome = starting.result(30)
    assert request.row.state == "completed"
    assert request.kinds.count("completed") == 1
    assert "failed" not in request.kinds
    assert outcome == NotStarted("completed", 3, None)
