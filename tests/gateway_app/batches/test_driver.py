"""The driver's thread: it starts when needed, waits where it must, hands over, and ends when told."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from gateway_app.batches import driver as module
from gateway_app.batches.batches import Batches
from gateway_app.batches.driver import Driver
from gateway_app.batches.files import Files
from gateway_app.batches.ports import SUBMITTERS
from gateway_app.governance.api_keys import Caller
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.errors import DatabaseUnavailable, ServiceUnavailable
from tasks.schema_batches import batches as batches_table
from tests.gateway_app.batches.fakes import URL, FakeGateway, jsonl, line, store
from tests.services import wait_until

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again soon."""
    monkeypatch.setattr(module, "RETRY_S", 0.02)


@pytest.fixture
def start(gateway: FakeGateway, files: Files) -> Iterator[Callable[..., Driver]]:
    """Return a function that starts a driver."""
    drivers: list[Driver] = []

    def make(**limits: Any) -> Driver:
        drivers.append(Driver(gateway.services(files, **limits), scout_s=0.05))
        drivers[-1].start()
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()


def status(database: Database, batch_id: str) -> str:
    """Return a batch's status."""
    query = sa.select(batches_table.c.status).where(batches_table.c.batch_id == batch_id)
    return str(database.read(lambda connection: connection.execute(query).scalar_one()))


def working_until_ended(gateway: FakeGateway, batch_id: str) -> str:
    """Let workers work until the batch has ended; return how."""

    def ended() -> str | None:
        gateway.work()
        found = status(gateway.database, batch_id)
        return found if found in ("completed", "failed", "expired", "cancelled") else None

    return wait_until(ended, 60, "the batch's end") or ""


@pytest.fixture
def create(database: Database, files: Files, batches: Batches, caller: Caller) -> Callable[[int], str]:
    """Return a function that makes a batch of so many lines and returns its id."""

    def make(count: int) -> str:
        content = jsonl(*(line(f"r-{number}") for number in range(count)))
        return str(batches.create(caller, URL, store(files, database, caller, content)).batch_id)

    return make


def test_many_batches_take_turns(
    gateway: FakeGateway, start: Callable[..., Driver], create: Callable[[int], str]
) -> None:
    """Several batches are under way at once in one thread."""
    ids = [create(6) for _ in range(3)]
    before = threading.active_count()
    driver = start(window=2)
    wait_until(lambda: len(gateway.rows("queued")) == 6, 30, "two requests of each batch")
    # The driver, and its submitters.
    assert threading.active_count() <= before + 1 + SUBMITTERS
    driver.start()
    for batch_id in ids:
        assert working_until_ended(gateway, batch_id) == "completed"
    assert len(gateway.rows("completed")) == 18


def test_closing_hands_over(gateway: FakeGateway, start: Callable[..., Driver], create: Callable[[int], str]) -> None:
    """A driver that is closed leaves its batches free at once, and no thread; the next one goes on."""
    batch_id = create(20)
    threads = set(threading.enumerate())
    first = start(window=5)
    wait_until(lambda: len(gateway.rows("queued")) == 5, 30, "a full window")
    first.close()
    assert set(threading.enumerate()) == threads
    first.start()
    assert set(threading.enumerate()) == threads
    started = time.monotonic()
    start()
    assert working_until_ended(gateway, batch_id) == "completed"
    assert time.monotonic() - started < 25
    assert max(Counter(gateway.body(row)["name"] for row in gateway.rows("completed")).values()) == 1


def test_a_driver_that_was_never_needed(gateway: FakeGateway, files: Files) -> None:
    """Closing it is no trouble."""
    Driver(gateway.services(files)).close()


def test_the_database_away(
    gateway: FakeGateway,
    start: Callable[..., Driver],
    create: Callable[[int], str],
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is waited for, at any point, and nothing is lost or done twice."""
    batch_id = create(30)
    chance = random.Random(5)
    away = threading.Event()
    write, read = database.write, database.read

    def failing(work: Callable[..., Any], real: Callable[..., Any]) -> Any:
        if threading.current_thread().name.startswith("batch-") and (away.is_set() or chance.random() < 0.05):
            raise DatabaseUnavailable
        return real(work)

    monkeypatch.setattr(database, "write", lambda work: failing(work, write))
    monkeypatch.setattr(database, "read", lambda work: failing(work, read))
    away.set()
    start(window=5, group=2)
    time.sleep(0.2)
    away.clear()
    assert working_until_ended(gateway, batch_id) == "completed"
    assert len(gateway.rows("completed")) == 30


def test_a_batch_that_cannot_be_driven(
    gateway: FakeGateway,
    files: Files,
    create: Callable[[int], str],
    database: Database,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a few unexpected errors it fails and says so, and other batches do not notice."""
    bad = create(1)
    other = KeyWrapper((os.urandom(32),))
    _, foreign = other.new_key(bad)
    spoil = sa.update(batches_table).where(batches_table.c.batch_id == bad).values(data_key=foreign)
    database.write(lambda connection: connection.execute(spoil) and None)
    good = create(3)
    driver = Driver(gateway.services(files), scout_s=0.05)
    driver.start()
    try:
        assert working_until_ended(gateway, good) == "completed"
        assert working_until_ended(gateway, bad) == "failed"
    finally:
        driver.close()
    query = sa.select(batches_table.c.errors).where(batches_table.c.batch_id == bad)
    [error] = database.read(lambda connection: connection.execute(query).scalar_one())
    assert error["code"] == "internal_error"
    assert "DecryptionFailed" in caplog.text


def test_a_queue_that_is_away_is_not_hammered(
    gateway: FakeGateway, start: Callable[..., Driver], create: Callable[[int], str]
) -> None:
    """After the first, which several threads may share, one try at a time, less and less often."""
    gateway.judge = lambda _body: ServiceUnavailable()
    batch_id = create(30)
    start()
    wait_until(lambda: gateway.submitted, 30, "a first try")
    time.sleep(2.5)
    assert sum(gateway.submitted.values()) <= SUBMITTERS + 2
    gateway.judge = lambda _body: None
    assert working_until_ended(gateway, batch_id) == "completed"


#: A gateway process with a driver, whose requests end by themselves after a while.
PROCESS = """
import random, sys, threading, time
from gateway_app.batches.driver import Driver
from gateway_app.batches.files import Files
from gateway_app.batches.ports import SUBMITTERS
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.settings import DatabaseGroup
from tests.gateway_app.batches.fakes import FakeGateway
database = Database(DatabaseGroup(url=sys.argv[1]))
keys = KeyWrapper((bytes.fromhex(sys.argv[2]),))
gateway = FakeGateway(database, keys)
driver = Driver(gateway.services(Files(database, keys), window=10, group=4, claim_s=0.5), scout_s=0.05)
driver.start()
print("ready", flush=True)
while True:
    time.sleep(0.02)
    gateway.work(random.Random())
"""


def test_processes_that_are_killed(database: Database, migrated_url: str, caller: Caller) -> None:
    """`kill -9` of gateway processes, two at a time, again and again: every line is run once and answered once."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    secret = os.urandom(32)
    keys = KeyWrapper((secret,))
    files = Files(database, keys)
    content = jsonl(*(line(f"r-{number}") for number in range(300)))
    batch_id = Batches(database, keys).create(caller, URL, store(files, database, caller, content)).batch_id
    command = [sys.executable, "-c", PROCESS, migrated_url, secret.hex()]
    processes: list[subprocess.Popen[str]] = []
    kills = 0
    deadline = time.monotonic() + 150
    try:
        while status(database, batch_id) not in ("completed", "failed"):
            assert time.monotonic() < deadline
            while len(processes) < 2:
                process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                processes.append(process)
            time.sleep(chance.random() * 0.6)
            if kills < 12:
                process = processes.pop(chance.randrange(len(processes)))
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    print(f"{kills} kills")
    assert status(database, batch_id) == "completed"
    gateway = FakeGateway(database, keys)
    ran = Counter(gateway.body(row)["name"] for row in gateway.rows("completed"))
    assert ran == {f"r-{number}": 1 for number in range(300)}
    assert not gateway.rows("queued", "running")
    [output] = files.page("default", "batch_output", None, 10, ascending=True)
    assert b"".join(files.read(output)).count(b"\n") == 300
