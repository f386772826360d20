"""Drivers that die, stall and come back at any point: every line is run once and answered once."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, TypeVar, cast

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.batches.batches import Batches
from gateway_app.batches.claims import ClaimLost, take
from gateway_app.batches.driver import drive
from gateway_app.batches.files import Files
from gateway_app.batches.ports import Backoff, Limits, Services
from gateway_app.governance.api_keys import Caller
from tasks.crypto import KeyWrapper
from tasks.db import Database, now
from tasks.errors import DatabaseUnavailable, GatewayError, QueueFull, ServiceUnavailable, UnknownAgent
from tasks.schema_batches import OPEN_STATUSES, batch_items
from tasks.schema_batches import batches as batches_table
from tests.gateway_app.batches.fakes import URL, FakeGateway, jsonl, line, store

T = TypeVar("T")
LINES = 25
MAX_STEPS = 3000


class Killed(BaseException):
    """The process ended here."""


class World:
    """One database, one batch, and drivers that fate plays with."""

    def __init__(self, seed: int, database: Database, keys: KeyWrapper, caller: Caller) -> None:
        self.chance = random.Random(seed)
        self.database = database
        self.gateway = FakeGateway(database, keys, self.judge)
        self.keys = keys
        self.drivers: list[Iterator[float]] = []
        self.pools: list[ThreadPoolExecutor] = []
        self.depth = 0
        self.calm = False
        files = Files(database, keys)
        lines = [line(name) for name in names()]
        self.batch_id = (
            Batches(database, keys).create(caller, URL, store(files, database, caller, jsonl(*lines))).batch_id
        )

    def judge(self, body: Mapping[str, Any]) -> GatewayError | None:
        """Refuse some lines always, and any line sometimes."""
        if body["name"].startswith("refused"):
            return UnknownAgent()
        return QueueFull() if not self.calm and self.chance.random() < 0.05 else None

    def fate(self) -> None:
        """Kill the driver that calls this, or let the database be away for it, or do nothing."""
        number = 1.0 if self.calm else self.chance.random()
        if number < 0.015:
            raise Killed
        if number < 0.02:
            raise DatabaseUnavailable

    def stall(self) -> None:
        """Let another driver take over and get on while the caller stands still, at times."""
        if self.calm or self.depth >= 2 or self.chance.random() >= 0.05:
            return
        self.depth += 1
        self.adopt()
        for _ in range(self.chance.randrange(8)):
            if self.drivers:
                self.step(self.drivers[-1])
                self.gateway.work(self.chance)
        self.depth -= 1

    def submit(self, *arguments: Any, **options: Any) -> None:
        """Submit a line, with fate before and after."""
        self.stall()
        self.fate()
        self.gateway.submit(*arguments, **options)
        self.fate()

    def adopt(self) -> None:
        """Let another driver believe that the one that has the batch is dead."""
        expired = sa.update(batches_table).values(claimed_until=now() - timedelta(seconds=1))
        self.database.write(lambda connection: connection.execute(expired) and None)
        perilous = cast("Database", Perilous(self))
        try:
            claim = take(perilous, "test", 30)
        except (Killed, ServiceUnavailable):
            return
        if claim is None:
            return
        # One thread a driver: then a seed says all that happens.
        pool = ThreadPoolExecutor(1)
        self.pools.append(pool)
        services = Services(
            database=perilous,
            files=Files(perilous, self.keys),
            keys=self.keys,
            submit=self.submit,
            render=self.gateway.render,
            cancel=self.gateway.cancel,
            pool=pool,
            limits=Limits(window=8, group=3, poll_s=0),
            backoff=Backoff(0, 0),
        )
        self.drivers.append(drive(services, claim))

    def step(self, driver: Iterator[float]) -> None:
        """Let a driver do its next piece of work; forget it if that was its last."""
        try:
            next(driver)
        except (StopIteration, ClaimLost, Killed, ServiceUnavailable):
            if driver in self.drivers:
                self.drivers.remove(driver)
        except ValueError as error:
            # A driver that stalls in the middle of this very piece of work.
            assert "already executing" in str(error)

    @property
    def status(self) -> str:
        """Return the batch's status."""
        query = sa.select(batches_table.c.status).where(batches_table.c.batch_id == self.batch_id)
        return str(self.database.read(lambda connection: connection.execute(query).scalar_one()))

    def run(self, happening: Callable[[], object] = lambda: None) -> None:
        """Let fate play until the batch has ended, then let every driver that is left find out."""
        for count in range(MAX_STEPS):
            if self.status not in OPEN_STATUSES:
                break
            self.calm = count > MAX_STEPS / 2
            if not self.drivers or self.chance.random() < 0.03:
                self.adopt()
            if self.drivers:
                self.step(self.chance.choice(self.drivers))
            self.gateway.work(self.chance)
            happening()
        assert self.status not in OPEN_STATUSES
        for driver in list(self.drivers):
            self.step(driver)
        assert not self.drivers

    def close(self) -> None:
        """End all threads."""
        for pool in self.pools:
            pool.shutdown()


class Perilous:
    """A database that its user may not survive."""

    def __init__(self, world: World) -> None:
        self.world = world

    def read(self, work: Callable[[Connection], T]) -> T:
        """Read, or not."""
        self.world.fate()
        return self.world.database.read(work)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Write, or not, or write and not learn of it, or later than one thinks."""
        self.world.stall()
        self.world.fate()
        result = self.world.database.write(work)
        self.world.fate()
        return result


def names() -> list[str]:
    """Return the custom_ids of the batch."""
    return [f"refused-{number}" if number % 10 == 3 else f"r-{number}" for number in range(LINES)]


@pytest.fixture
def world(request: pytest.FixtureRequest, database: Database, keys: KeyWrapper, caller: Caller) -> Iterator[World]:
    """Return a world of a seed that is printed."""
    seed = request.param if request.param is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    world = World(seed, database, keys, caller)
    yield world
    world.close()


def answers(world: World) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of the batch's output and error files."""
    query = sa.select(batches_table.c.output_file_id, batches_table.c.error_file_id)
    row = world.database.read(lambda connection: connection.execute(query).one())
    files = Files(world.database, world.keys)
    found = {}
    for kind, file_id in (("output", row[0]), ("error", row[1])):
        content = b"".join(files.read(files.find(file_id, "default"))) if file_id else b""
        found[kind] = [json.loads(text) for text in content.splitlines()]
    assert len(files.page("default", "batch_output", None, 10, ascending=True)) == sum(map(bool, row))
    return found


def runs(world: World) -> Counter[str]:
    """Return how often each line was run to an answer."""
    return Counter(world.gateway.body(row)["name"] for row in world.gateway.rows("completed"))


SEEDS = [1, 2, 3, 4, None, None]


@pytest.mark.parametrize("world", SEEDS, indirect=True)
def test_every_line_once(world: World) -> None:
    """Whatever happens to its drivers, each line has one request that ran, and one answer."""
    world.run()
    assert world.status == "completed"
    good = [name for name in names() if not name.startswith("refused")]
    assert runs(world) == dict.fromkeys(good, 1)
    assert not world.gateway.rows("queued", "running")
    found = answers(world)
    assert [answer["custom_id"] for answer in found["output"]] == good
    assert all(answer["response"]["body"]["echo"]["name"] == answer["custom_id"] for answer in found["output"])
    assert [answer["custom_id"] for answer in found["error"]] == [name for name in names() if name not in good]
    query = sa.select(batches_table.c.total, batches_table.c.completed, batches_table.c.failed)
    counted = world.database.read(lambda connection: connection.execute(query).one())
    assert tuple(counted) == (LINES, len(good), LINES - len(good))


@pytest.mark.parametrize("world", SEEDS, indirect=True)
@pytest.mark.parametrize("ending", ["cancelled", "expired"])
def test_every_line_once_when_it_ends_early(world: World, ending: str) -> None:
    """A batch that is cancelled, or expires, tells the truth: what it says did not run has no answer."""
    left = world.chance.randrange(1, 25)

    def happening() -> None:
        nonlocal left
        left -= 1
        if left != 0:
            return
        if ending == "expired":
            past = sa.update(batches_table).values(expires_at=now() - timedelta(seconds=1))
            world.database.write(lambda connection: connection.execute(past) and None)
        elif world.status in ("validating", "in_progress"):
            Batches(world.database, world.keys).cancel(world.batch_id, "default")

    world.run(happening)
    assert world.status in (ending, "completed")
    assert not world.gateway.rows("queued", "running")
    found = answers(world)
    told = Counter(answer["custom_id"] for answer in found["output"] + found["error"])
    query = sa.select(batch_items.c.custom_id)
    stored = world.database.read(lambda connection: connection.execute(query).scalars().all())
    assert told == dict.fromkeys(stored, 1)
    assert set(stored) in (set(names()), set())
    assert runs(world) == dict.fromkeys((answer["custom_id"] for answer in found["output"]), 1)
