"""Anything in any order: one request and everybody who may have a say in it, against the model.

The gateway admits and cancels. Three workers begin attempts by messages of any epoch, and answer, fail, give back or hand
back; a worker that crashes does nothing any more, and one that was given up for lost may still say anything, any time
later. The housekeeper publishes again, by what it saw now or long ago, and expires. Everybody may say everything again,
as after a commit whose answer was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, cast
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy.engine import Connection, Engine

from tasks import lifecycle, requests_read
from tasks.audit.events import ciphertext_hash
from tasks.ids import new_request_id
from tasks.lifecycle import Attempt, NotStarted, Refusal, Republished
from tasks.schema import KINDS, TERMINAL_KINDS
from tasks.states import reached
from tests.tasks.lifecycle.admitted import MAX_EPOCHS, WORKERS, End, Said, answer, events_of, new_admission, row_of
from tests.tasks.lifecycle.model import MAX_ATTEMPTS, Model

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
CLOCKS = ("admission", "attempts", "ending", "giving_back", "publication")
#: How often something is said: once, or again and again because no answer came.
times = st.sampled_from([1, 1, 1, 2, 3])
#: How many epochs a message, or what the housekeeper saw, is behind; -1 is one that nobody published.
behind = st.sampled_from([0, 0, 0, 0, 1, -1])
refusals = st.sampled_from([None, None, ("vetoed", "policy_veto"), ("failed", "key_revoked")])
codes = st.sampled_from(["engine_failed", "engine_dead"])


class Lifecycle(RuleBasedStateMachine):
    """One request in a database that all runs share, and a clock that only moves when it is told to."""

    engine: ClassVar[Engine]
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.connection = self.engine.connect()
        self.time = NOON
        self.clocks = [mock.patch(f"tasks.lifecycle.{module}.now", self.now) for module in CLOCKS]
        for clock in self.clocks:
            clock.start()
        self.model = Model()
        #: The kinds of events in the order in which they came, and which of them were counted already.
        self.path: list[str] = []
        self.counted: set[tuple[str, int, int]] = set()
        self.ended_row: Any = None
        self.steps = 0

    def now(self) -> datetime:
        """Return what time it is here."""
        return self.time

    def teardown(self) -> None:
        """Give the modules their clock back."""
        for clock in self.clocks:
            clock.stop()
        self.connection.close()

    def do(self, work: Callable[[Connection], Any]) -> Any:
        """Run one write as the writer thread does."""
        with self.connection.begin():
            return work(self.connection)

    def is_early(self, say: Callable[[Model], Any]) -> bool:
        """Tell whether this would end the request before its run has come far; then it is better left unsaid."""
        self.steps += 1
        trial = deepcopy(self.model)
        say(trial)
        return trial.ended and not self.model.ended and self.steps < self.first_end

    # --- The gateway

    @initialize(target=attempts, hours=st.sampled_from([None, None, 2, 6]), first_end=st.sampled_from([0, 10, 20]))
    def admit(self, hours: int | None, first_end: int) -> Any:
        """Admit the request, and mostly have it taken at once."""
        self.first_end = first_end
        self.model.deadline = None if hours is None else NOON + timedelta(hours=hours)
        admission = new_admission(deadline=self.model.deadline)
        self.subject, self.id = admission.subject, admission.subject.request_id
        assert self.do(lambda connection: lifecycle.admit(connection, admission)).request_id == self.id
        return self.take(WORKERS[0]) if first_end else multiple()

    @rule(organization=st.sampled_from(["acme", "globex"]), times=times)
    def cancel(self, organization: str, times: int) -> None:
        """A client cancels: a queued request ends, a running one is marked, and of others' there is nothing to see."""
        if organization == "acme" and (self.is_early(Model.cancel) or self.steps < self.first_end):
            return
        for _ in range(times):
            before = self.model.state
            row = self.do(lambda connection: lifecycle.cancel(connection, self.id, organization))
            if organization == "acme":
                self.model.cancel()
                assert row.state == before
            else:
                assert row is None

    @rule(times=times)
    def expire(self, times: int) -> None:
        """A watcher looks at the request and finds that nobody took it in time, or that it is none of that."""
        if self.is_early(lambda model: model.expire(self.time)):
            return
        for _ in range(times):
            self.do(lambda connection: lifecycle.expire(connection, self.id))
            self.model.expire(self.time)

    # --- The workers

    @rule(target=attempts, worker=st.sampled_from(WORKERS))
    def take(self, worker: str) -> Any:
        """A worker gets the message that counts, as it mostly does."""
        return self._start(worker, self.model.epoch, None, 1)

    @rule(target=attempts, worker=st.sampled_from(WORKERS), behind=behind, refused=refusals, times=times)
    def start(self, worker: str, behind: int, refused: tuple[str, str] | None, times: int) -> Any:
        """A worker gets a message, perhaps one of another epoch. Begun twice, it is the second attempt that counts."""
        return self._start(worker, self.model.epoch - behind, refused, times)

    def _start(self, worker: str, epoch: int, refused: tuple[str, str] | None, times: int) -> Any:
        refusal = None if refused is None else Refusal(cast("Any", refused[0]), refused[1], {})
        begun: list[Attempt] = []
        for _ in range(times):
            if self.is_early(lambda model: model.start(epoch, worker, refused, self.time)):
                break
            expected = self.model.start(epoch, worker, refused, self.time)
            started = self.do(
                lambda connection: lifecycle.start(connection, self.id, epoch, worker, MAX_ATTEMPTS, refusal)
            )
            model = self.model
            if expected:
                assert started == Attempt(self.subject, epoch, model.attempt, worker, model.deadline)
                begun.append(started)
            else:
                assert started == NotStarted(model.state, model.attempt, model.code, model.result is not None)
        return multiple(*begun)

    @rule(
        attempt=attempts,
        text=st.sampled_from(["one", "two"]),
        state=st.sampled_from(["completed", "completed", "cancelled", "expired"]),
        times=times,
    )
    def answer(self, attempt: Attempt, text: str, state: Said, times: int) -> None:
        """An attempt, however old, says that it has an answer, or what it had said when it was stopped."""
        code, sealed = None if state == "completed" else state, text.encode()
        if self.is_early(lambda model: model.finish(attempt, state, code, sealed)):
            return
        expected = self.model.finish(attempt, state, code, sealed)
        for _ in range(times):
            assert self.do(lambda c: lifecycle.answer(c, attempt, answer(text, state), sealed, state)) == expected

    @rule(attempt=attempts, state=st.sampled_from(["failed", "failed", "cancelled", "expired"]), times=times)
    def finish(self, attempt: Attempt, state: End, times: int) -> None:
        """An attempt, however old, says that it ended for good, without an answer."""
        if self.is_early(lambda model: model.finish(attempt, state, "model_mismatch", None)):
            return
        expected = self.model.finish(attempt, state, "model_mismatch", None)
        for _ in range(times):
            assert self.do(lambda c: lifecycle.finish(c, attempt, state, code="model_mismatch")) == expected

    @rule(attempt=attempts, code=codes, drained=st.booleans(), minutes=st.sampled_from([0, 1]), times=times)
    def give_back(self, attempt: Attempt, code: str, *, drained: bool, minutes: int, times: int) -> None:
        """An attempt, however old, ended without an answer: by its engine's fault, or because its worker was stopped."""
        code = "worker_draining" if drained else code
        delay, most = timedelta(minutes=minutes), None if drained else MAX_ATTEMPTS
        if self.is_early(lambda model: model.give_back(attempt, code, delay, excused=drained, at=self.time)):
            return
        expected = self.model.give_back(attempt, code, delay, excused=drained, at=self.time)
        for _ in range(times):
            given = self.do(
                lambda c: lifecycle.give_back(c, attempt, code, delay_s=delay.total_seconds(), max_attempts=most)
            )
            assert given == expected

    # --- The housekeeper

    @rule(behind=behind, attempts_behind=st.sampled_from([0, 0, 0, 1]), times=times)
    def republish(self, behind: int, attempts_behind: int, times: int) -> None:
        """The housekeeper saw no message of the request, a moment or a long time ago."""
        model = self.model
        epoch, attempt = model.epoch - behind, model.attempt - attempts_behind
        for _ in range(times):
            if self.is_early(lambda model: model.republish(epoch, attempt, self.time)):
                break
            expected = model.republish(epoch, attempt, self.time)
            again = self.do(lambda c: lifecycle.republish(c, self.id, epoch, attempt, max_epochs=MAX_EPOCHS))
            if expected:
                assert again == Republished(
                    self.id, model.epoch, "acme", "ab" * 32, 700, "normal", b"wrapped", b"sealed message", self.time
                )
            else:
                assert again is None

    @rule(times=times)
    def expire_overdue(self, times: int) -> None:
        """The housekeeper ends what is too late."""
        if self.is_early(lambda model: model.expire(self.time)):
            return
        for _ in range(times):
            expected = self.model.expire(self.time)
            assert (self.id in self.do(lambda c: lifecycle.expire_overdue(c, 1000))) == expected

    # --- Nobody

    @rule(minutes=st.sampled_from([1, 1, 59, 60]))
    def pass_time(self, minutes: int) -> None:
        """Time passes, perhaps up to the very instant of the deadline."""
        self.time += timedelta(minutes=minutes)

    @rule(attempt=attempts)
    def fail_in_the_middle(self, attempt: Attempt) -> None:
        """A transaction that is rolled back has changed neither the row nor the record."""
        with self.connection.begin() as transaction:
            lifecycle.give_back(self.connection, attempt, "engine_failed", max_attempts=MAX_ATTEMPTS)
            lifecycle.cancel(self.connection, self.id, "acme")
            lifecycle.republish(self.connection, self.id, attempt.epoch, attempt.number, max_epochs=MAX_EPOCHS)
            transaction.rollback()

    # --- What always holds

    @invariant()
    def the_row_is_the_models(self) -> None:
        """State, fence, counts and what is kept; of a request that has ended nothing changes any more."""
        model = self.model
        with self.connection.begin():
            row = row_of(self.connection, self.id)
            to_stop = requests_read.to_stop(self.connection, [self.id, new_request_id()])
        assert (row.state, row.epoch, row.attempt, row.excused, row.error_code, row.result, row.not_before) == (
            model.state, model.epoch, model.attempt, model.excused, model.code, model.result, model.not_before,
        )  # fmt: skip
        assert row.worker == (model.starts[-1][2] if model.starts else None)
        assert row.attempt - row.excused <= MAX_ATTEMPTS
        assert row.message == (None if model.ended else b"sealed message")
        assert (row.finished_at is not None) == model.ended
        assert (row.cancel_requested_at is not None) == model.cancel_requested
        assert to_stop == [self.id] * model.cancel_requested
        if self.ended_row is not None:
            assert tuple(row) == self.ended_row
        elif model.ended:
            self.ended_row = tuple(row)

    @invariant()
    def the_record_is_a_path(self) -> None:
        """Each start and each return to the queue once, at most one terminal event, and nothing that cannot follow."""
        model = self.model
        with self.connection.begin():
            events = events_of(self.connection, self.id)
        assert [(e.epoch, e.attempt, e.worker) for e in events if e.kind == "started"] == model.starts
        again = [(e.epoch, e.attempt, e.code) for e in events if e.kind == "requeued"]
        assert sorted(again) == sorted(model.requeued)
        terminal = [event for event in events if event.kind in TERMINAL_KINDS]
        assert len(terminal) == int(model.ended)
        for end in terminal:
            assert (end.kind, end.code, (end.epoch, end.attempt)) == (model.kind, model.code, model.ended_by)
            assert end.payload_sha256 == (None if model.result is None else ciphertext_hash(model.result))
        new = [e for e in events if (e.kind, e.attempt, e.epoch) not in self.counted]
        self.path += [event.kind for event in sorted(new, key=lambda e: (e.attempt, e.epoch, KINDS.index(e.kind)))]
        self.counted |= {(event.kind, event.attempt, event.epoch) for event in new}
        assert model.state in reached(self.path)
        if model.ended:
            assert reached(self.path) == {model.state}
