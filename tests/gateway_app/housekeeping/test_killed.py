"""Real processes, killed where it hurts: what was accepted is run to its end, once, and only because of a housekeeper.

The second test goes on where the first has ended: starting these processes takes longer than what they do.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
import requests

from tests.conftest import new_key
from tests.fleet import Gateway, own_services
from tests.housekeepers import HousekeeperProcess
from tests.services import wait_until
from tests.workers import Worker

SOON_S = 60.0
LEASE_S = 2.0
TASK = {"agent": "incident-responder", "directive": "What now?", "sampling": {"max_tokens": 20}}
LEADS = "metaqore:housekeeper"
COLUMNS = "state, epoch, attempt, excused"


@dataclass
class Site:
    """A gateway, a worker and housekeepers on one Redis and one SQLite."""

    folder: Path
    environment: dict[str, str]
    key: str
    redis: redis.Redis
    gateway: Gateway | None = None
    housekeepers: list[HousekeeperProcess] = field(default_factory=list)

    def start_gateway(self) -> None:
        """Start a gateway, and return once it takes requests."""
        self.gateway = gateway = Gateway(self.folder / "gateway.log", self.environment)

        def answers() -> bool:
            try:
                return bool(requests.get(f"{gateway.url}/healthz", timeout=10).ok)
            except requests.ConnectionError:
                return False

        wait_until(answers, SOON_S, "a gateway")

    def start_housekeeper(self) -> HousekeeperProcess:
        """Start a housekeeper, and return at once."""
        process = HousekeeperProcess(self.folder / f"housekeeper{len(self.housekeepers)}.log")
        self.housekeepers.append(process)
        return process

    def submit(self, **task: Any) -> str:
        """Submit a task; return its id."""
        assert self.gateway is not None
        headers = {"Authorization": f"Bearer {self.key}"}
        answer = requests.post(f"{self.gateway.url}/v1/tasks", json=TASK | task, headers=headers, timeout=30)
        assert answer.status_code == 202, answer.text
        request_id: str = answer.json()["id"]
        return request_id

    def query(self, statement: str, *values: str) -> list[Any]:
        """Return what the database holds."""
        with closing(self.connect()) as database:
            return database.execute(statement, values).fetchall()

    def connect(self) -> sqlite3.Connection:
        """Return a connection to the database."""
        return sqlite3.connect(self.folder / "gateway.db", timeout=10, isolation_level=None)

    def row(self, request_id: str) -> dict[str, Any]:
        """Return how far a request is."""
        [values] = self.query(f"SELECT {COLUMNS} FROM requests WHERE request_id = ?", request_id)
        return dict(zip(COLUMNS.split(", "), values, strict=True))

    def kinds(self, request_id: str) -> Counter[str]:
        """Return how many events of each kind a request has."""
        return Counter(kind for (kind,) in self.query("SELECT kind FROM audit_events WHERE request_id = ?", request_id))

    def all_completed(self, ids: list[str]) -> None:
        """Wait until all of these have completed; each has one terminal event."""
        open_ = "SELECT count(*) FROM requests WHERE finished_at IS NULL"
        wait_until(lambda: self.query(open_) == [(0,)], SOON_S, "the end of every request")
        assert [self.row(request_id)["state"] for request_id in ids] == ["completed"] * len(ids)
        assert all(self.kinds(request_id)["completed"] == 1 for request_id in ids)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Site]:
    """Return the site, with nothing running on it yet but Redis."""
    folder = tmp_path_factory.mktemp("site")
    settings = {"SCHEDULING__LEASE_S": str(LEASE_S), "ENGINE__MAX_NUM_SEQS": "3"}
    settings["ENGINE__OPTIONS"] = '{"time_scale": 8}'
    with own_services(folder, tiny_model, **settings) as environment, ExitStack() as stack:
        client = stack.enter_context(redis.Redis.from_url(environment["REDIS_URL"]))
        made = Site(folder, os.environ | environment, new_key("default"), client)
        yield made
        for housekeeper in made.housekeepers:
            housekeeper.kill()
        if made.gateway is not None:
            made.gateway.kill()


@pytest.fixture
def worker(site: Site) -> Iterator[Worker]:
    """Return a worker that runs three requests at once, and each of them for a while. It is not started."""
    worker = Worker(site.folder / "worker.log")
    yield worker
    worker.kill()


@pytest.fixture(autouse=True)
def configured_as_the_site(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give what a test starts the site's settings, which each test's own have replaced."""
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)


def test_a_gateway_is_killed_between_commit_and_publish(site: Site) -> None:
    """Nothing but SQL knows of the request. It stays so without a housekeeper; with one it is queued."""
    site.start_gateway()
    asked = "cmdstat_evalsha"

    def scripts() -> int:
        stats: Any = site.redis.info("commandstats")
        return int(stats.get(asked, {}).get("calls", 0)) + int(stats.get("cmdstat_eval", {}).get("calls", 0))

    first = site.submit()
    before = scripts()
    with closing(site.connect()) as database:
        database.execute("BEGIN IMMEDIATE")
        client = threading.Thread(target=submit_in_vain, args=(site,))
        client.start()
        # There is room, and the commit has to wait for us.
        wait_until(lambda: scripts() > before, SOON_S, "the question for room")
        site.redis.client_pause(60_000, all=False)
        database.execute("ROLLBACK")
    ids = "SELECT request_id FROM requests WHERE request_id <> ?"
    [(request_id,)] = wait_until(lambda: site.query(ids, first), SOON_S, "the commit")
    assert site.gateway is not None
    site.gateway.kill()
    client.join()
    site.redis.client_unpause()
    tag = f"{request_id}:1"
    assert site.redis.hexists("metaqore:gpu:messages", f"{first}:1")
    assert not site.redis.hexists("metaqore:gpu:messages", tag)
    # The control: longer than a housekeeper needs.
    threading.Event().wait(3.0)
    assert site.row(request_id) == {"state": "queued", "epoch": 1, "attempt": 0, "excused": 0}
    assert not site.redis.hexists("metaqore:gpu:messages", tag)
    site.start_housekeeper()
    wait_until(lambda: site.redis.hexists("metaqore:gpu:messages", f"{request_id}:2"), SOON_S, "its message")
    assert site.row(first)["epoch"] == 1


def submit_in_vain(site: Site) -> None:
    """Submit a task to a gateway that will not live to answer."""
    with suppress(requests.RequestException):
        site.submit()


def test_redis_loses_everything_and_the_leader_dies(site: Site, worker: Worker) -> None:
    """What runs goes on, once: its worker tells Redis of it again. What waited is queued by the housekeeper that is left."""
    site.start_housekeeper()
    worker.start()
    site.start_gateway()
    ids = [site.submit(sampling={"max_tokens": 40, "seed": number}) for number in range(6)]
    running = "SELECT request_id FROM requests WHERE state = 'running'"
    wait_until(lambda: len(site.query(running)) == 3, SOON_S, "three running requests")
    leader, other = site.housekeepers
    wait_until(lambda: "ready." in other.log.read_text(), SOON_S, "the second housekeeper")
    holder: Any = site.redis.get(LEADS)
    began = [request_id for (request_id,) in site.query(running)]
    site.redis.flushall()
    leader.kill()
    # As if it had renewed its leadership just before its death.
    site.redis.set(LEADS, holder, px=1500)
    site.all_completed(ids)
    assert "this housekeeper leads" in other.log.read_text()
    assert all(site.kinds(request_id)["started"] == 1 for request_id in ids), "each ran once"
    again = [request_id for request_id in ids if site.row(request_id)["epoch"] > 1]
    assert len(again) >= 2, "those that waited were queued again"
    assert not set(again) & set(began)
