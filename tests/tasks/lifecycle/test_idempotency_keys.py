"""Asking twice: one request for each use of a key, for a day, whoever asks at once and whatever became of it.

A state machine lets clients of two organizations use three keys in any order, on SQLite; the explicit tests after it run
on both databases, and truly at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from typing import Any, ClassVar
from unittest import mock

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy.engine import Connection, Engine

from tasks import lifecycle, requests_read
from tasks.db import now
from tasks.errors import IdempotencyConflict
from tasks.idempotency import earlier_use, forget, forget_old, repoint
from tasks.ids import new_request_id
from tasks.schema import TERMINAL_STATES, audit_events, idempotency_keys, requests
from tests.tasks.lifecycle.admitted import End, Request, idempotency, new_admission
from tests.tasks.lifecycle.machine import NOON

ORGANIZATIONS = ("acme", "globex")


class Keys(RuleBasedStateMachine):
    """Clients of two organizations that use three keys, now for this body and now for that."""

    engine: ClassVar[Engine]

    def __init__(self) -> None:
        super().__init__()
        self.connection = self.engine.connect()
        self.time = NOON
        self.clocks = [mock.patch(f"tasks.{module}.now", self.now) for module in ("lifecycle.admission", "idempotency")]
        for clock in self.clocks:
            clock.start()
        #: Runs share a database, so each has organizations of its own.
        self.names = {name: new_request_id() for name in ORGANIZATIONS}
        #: Which request holds a key: its body, its id, and when it was admitted.
        self.held: dict[tuple[str, str], tuple[str, str, datetime]] = {}
        self.admitted: list[str] = []

    def now(self) -> datetime:
        """Return what time it is here."""
        return self.time

    def teardown(self) -> None:
        """Give the modules their clock back, and leave no keys to the next run."""
        for clock in self.clocks:
            clock.stop()
        self.do(lambda connection: connection.execute(sa.delete(idempotency_keys)))
        self.connection.close()

    def do(self, work: Callable[[Connection], Any]) -> Any:
        """Run one write as the writer thread does."""
        with self.connection.begin():
            return work(self.connection)

    @rule(organization=st.sampled_from(ORGANIZATIONS), key=st.sampled_from("abc"), body=st.sampled_from("xxy"))
    def ask(self, organization: str, key: str, body: str) -> None:
        """The same key and body give the same request, the same key and another body give an error, else it is new."""
        admission = new_admission(self.names[organization], idempotency=idempotency(key, body))
        held = self.held.get((organization, key))
        if held is None or self.time - held[2] > timedelta(hours=24):
            assert self.do(lambda c: lifecycle.admit(c, admission)).request_id == admission.subject.request_id
            self.held[organization, key] = (body, admission.subject.request_id, self.time)
            self.admitted.append(admission.subject.request_id)
        elif held[0] == body:
            assert self.do(lambda c: lifecycle.admit(c, admission)).request_id == held[1]
        else:
            with pytest.raises(IdempotencyConflict):
                self.do(lambda c: lifecycle.admit(c, admission))

    @rule()
    def ask_without_a_key(self) -> None:
        """Who gives no key gets a request of its own each time."""
        admission = new_admission(self.names["acme"])
        assert self.do(lambda c: lifecycle.admit(c, admission)).request_id == admission.subject.request_id
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
        self.do(lambda c: forget(c, request_id, organization or self.names[owner]))
        if organization is None:
            del self.held[owner, key]

    @precondition(lambda self: self.held)
    @rule(choose=st.randoms(use_true_random=False), organization=st.sampled_from([None, "initech"]))
    def retry(self, choose: Random, organization: str | None) -> None:
        """A request is repeated as another one: its key stands for that one then. Others cannot have it do so."""
        owner, key = choose.choice(sorted(self.held))
        body, request_id, at = self.held[owner, key]
        admission = new_admission(self.names[owner])
        later = self.do(lambda c: lifecycle.admit(c, admission)).request_id
        self.admitted.append(later)
        self.do(lambda c: repoint(c, organization or self.names[owner], request_id, later))
        if organization is None:
            self.held[owner, key] = (body, later, at)

    @rule(limit=st.sampled_from([1, 2, 100]))
    def forget_old(self, limit: int) -> None:
        """The housekeeper clears away what is older than a day, and nothing else."""
        cleared = self.do(lambda c: forget_old(c, limit))
        assert cleared <= limit
        if cleared < limit:
            assert self.oldest() is None or self.time - self.oldest() <= timedelta(hours=24)

    def oldest(self) -> Any:
        """Return when the oldest key that is noted was used."""
        query = sa.select(sa.func.min(idempotency_keys.c.created_at))
        return self.do(lambda c: c.execute(query).scalar_one())

    @invariant()
    def one_request_a_use(self) -> None:
        """There is a row for each request that was taken, with its two events, and none for one that was repeated."""
        mine = self.names.values()
        with self.connection.begin():
            rows = (
                self.connection.execute(sa.select(requests.c.request_id).where(requests.c.organization.in_(mine)))
                .scalars()
                .all()
            )
            events = self.connection.execute(
                sa.select(sa.func.count()).select_from(audit_events).where(audit_events.c.organization.in_(mine))
            ).scalar_one()
            keys = self.connection.execute(
                sa.select(idempotency_keys.c.created_at, idempotency_keys.c.request_id)
            ).all()
        assert sorted(rows) == sorted(self.admitted)
        assert events == 2 * len(self.admitted)
        valid = {request_id for _, request_id, at in self.held.values() if self.time - at <= timedelta(hours=24)}
        assert {key.request_id for key in keys if self.time - key.created_at <= timedelta(hours=24)} == valid


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_keys_in_any_order(engine: Engine) -> None:
    """One request for each use of a key."""
    sa.event.listen(engine, "connect", lambda driver, _record: driver.execute("PRAGMA synchronous=OFF"))
    Keys.engine = engine
    chosen = settings(
        max_examples=30, stateful_step_count=30, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Keys, settings=chosen)


def admit(engine: Engine, admission: lifecycle.Admission) -> str:
    """Admit a request as the writer thread does, and once more if the database refused it, as the pipeline does."""
    for last in (False, True):
        try:
            with engine.execution_options(immediate=True).begin() as connection:
                return str(lifecycle.admit(connection, admission).request_id)
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
        assert len(requests_read.page(connection, organization, {}, None, 100)) == 3


def test_a_key_is_free_again_after_a_day_or_when_it_is_forgotten(engine: Engine) -> None:
    """To the second; what is older than a day counts for nothing, and is cleared away when somebody tidies up."""
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
        assert earlier_use(connection, organization, idempotency("b", "x")) is None
    with engine.execution_options(immediate=True).begin() as connection:
        while forget_old(connection, 1):
            pass
        kept = connection.execute(sa.select(idempotency_keys.c.request_id)).scalars().all()
        assert (ids[0] in kept, ids[1] in kept) == (True, False)
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
        [row] = requests_read.page(connection, organization, {}, None, 100)
    won = bodies[answers.index(row.request_id)]
    assert answers == [row.request_id if body == won else None for body in bodies]


def test_a_key_of_yesterday_is_used_again_before_it_is_cleared_away(engine: Engine) -> None:
    """Nobody has to tidy up for that; the key stands for the new request then, with the new body."""
    organization = new_request_id()
    old = admit(engine, new_admission(organization, idempotency=idempotency("a", "x")))
    with engine.execution_options(immediate=True).begin() as connection:
        yesterday = now() - timedelta(hours=24, seconds=1)
        connection.execute(sa.update(idempotency_keys).values(created_at=yesterday))
    new = admit(engine, new_admission(organization, idempotency=idempotency("a", "y")))
    assert new != old
    assert admit(engine, new_admission(organization, idempotency=idempotency("a", "y"))) == new
    with pytest.raises(IdempotencyConflict):
        admit(engine, new_admission(organization, idempotency=idempotency("a", "x")))


def test_a_key_of_yesterday_that_many_use_at_once(engine: Engine) -> None:
    """One of them is taken, and the others are told of it: an old key is no gap."""
    organization = new_request_id()
    old = admit(engine, new_admission(organization, idempotency=idempotency("a", "x")))
    with engine.execution_options(immediate=True).begin() as connection:
        yesterday = now() - timedelta(hours=24, seconds=1)
        connection.execute(sa.update(idempotency_keys).values(created_at=yesterday))
    barrier = threading.Barrier(6)

    def ask(_number: int) -> str:
        admission = new_admission(organization, idempotency=idempotency("a", "x"))
        barrier.wait(30)
        return admit(engine, admission)

    with ThreadPoolExecutor(6) as threads:
        [new] = set(threads.map(ask, range(6)))
    assert new != old


@pytest.mark.parametrize("state", TERMINAL_STATES)
def test_the_key_of_a_request_that_ended(engine: Engine, state: End) -> None:
    """However it ended, asking again begins nothing: a client that wants another try uses another key."""
    organization = new_request_id()
    key = idempotency("a", "x")
    request = Request(engine, organization=organization, idempotency=key)
    assert request.finish(request.begun(), state, "some_code")
    assert admit(engine, new_admission(organization, idempotency=key)) == request.id


def test_a_key_that_stands_for_the_retry(engine: Engine) -> None:
    """A dead request that was repeated: who asks again with its key hears of the one that runs."""
    organization, key = new_request_id(), idempotency("a", "x")
    dead = Request(engine, organization=organization, idempotency=key)
    later = Request(engine, organization=organization)
    dead.do(lambda c: repoint(c, "somebody else", dead.id, later.id))
    assert admit(engine, new_admission(organization, idempotency=key)) == dead.id
    dead.do(lambda c: repoint(c, organization, dead.id, later.id))
    assert admit(engine, new_admission(organization, idempotency=key)) == later.id
