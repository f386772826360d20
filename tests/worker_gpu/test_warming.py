"""Versions that are computed before requests get them, and kept computed: with real workers, which are killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app.housekeeping.pins import PinnedProfiles
from gateway_app.profiles.wishes import Wishes
from tasks.db import Database
from tasks.queueing.keys import QueueKeys
from tasks.schema import audit_events
from tasks.settings import PREFIX, settings
from tests.profile_calls import add, change, create, read, run
from tests.services import RedisServer, wait_until
from tests.workers import Worker

WAIT_S = 60.0
FIRST, SECOND = "gpu@first", "gpu@second"
#: Longer than a block of the KV cache.
TEXT = "You write a poem of four lines about whatever you are asked. " * 20


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return one kind of database: what there is about SQL here is tried on both elsewhere."""
    kind: str = request.param
    return kind


@pytest.fixture
def redis_url(own_redis: RedisServer) -> str:
    """Give the test a Redis of its own, to be emptied."""
    return own_redis.url


@pytest.fixture
def configured(configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for as long as a loaded machine may need."""
    monkeypatch.setenv(f"{PREFIX}PROFILES__WARM_S", str(WAIT_S))
    settings.cache_clear()


@pytest.fixture
def workers(tmp_path: Path, configured: None) -> Iterator[tuple[Worker, Worker]]:
    """Return two workers that are not started."""
    made = Worker(tmp_path / "first.log", FIRST), Worker(tmp_path / "second.log", SECOND)
    with ExitStack() as stack:
        for worker in made:
            stack.callback(worker.stop)
        yield made


def pinned(client: FlaskClient) -> dict[str, Any]:
    """Return how the agent is pinned, and where."""
    found: dict[str, Any] = client.get("/v1/profiles/poet/pin").get_json()
    return found


def test_warm_from_the_first_request_on(client: FlaskClient, workers: tuple[Worker, Worker]) -> None:
    """Whatever happens to workers and Redis, the active version is computed before a request asks for it."""
    connection = redis.Redis.from_url(settings().gateway.request_queue_url)
    keys = QueueKeys("metaqore:")
    wishes = Wishes(connection, keys)

    def holders() -> list[str]:
        return sorted(pinned(client)["workers"])

    def epoch(worker: str) -> str | None:
        text = cast("bytes | None", connection.hget(keys.named("facts"), worker))
        return json.loads(text)["epoch"] if text else None

    # Nobody is there to compute it, and nobody waits for that.
    cold = create(client, "poet", TEXT, activate=True).json["warm"]
    assert (cold["copies"], cold["workers"], cold["why"]) == (1, [], "no_worker")
    assert cold["waited_s"] < 10
    for worker in workers:
        worker.start()
    wait_until(lambda: epoch(FIRST) and epoch(SECOND), WAIT_S, "two workers that report")
    # The first request of a version finds its whole static part.
    version = add(client, "poet", f"Two. {TEXT}", activate=True).json
    assert version["warm"]["why"] is None, version["warm"]
    (holder,) = version["warm"]["workers"]
    assert holder in (FIRST, SECOND)
    accepted = run(client, "poet").json["id"]
    answered = audit_events.c.request_id == accepted, audit_events.c.kind == "completed"
    query = sa.select(audit_events).where(*answered)
    wait_until(lambda: read(query) != [], WAIT_S, "an answer")
    row = read(query)[0]
    assert row.worker == holder
    assert version["static_token_count"] - 16 < row.cached_tokens <= version["static_token_count"]
    # A pin is on as many workers as it says, and goes over to the next version, on as many.
    assert client.put("/v1/profiles/poet/pin", json={"copies": 2}).json["copies"] == 2
    wait_until(lambda: holders() == [FIRST, SECOND], WAIT_S, "two copies")
    add(client, "poet", f"Three. {TEXT}")
    moved = change(client, "poet", "activate", version=3).json
    assert (moved["warm"]["workers"], moved["warm"]["why"]) == ([FIRST, SECOND], None), moved["warm"]
    assert [*wishes.lasting()] == [moved["static_profile_hash"]]
    # What takes a killed worker's place computes it again.
    killed = epoch(FIRST)
    workers[0].kill()
    workers[0].start()
    wait_until(
        lambda: epoch(FIRST) != killed and holders() == [FIRST, SECOND],
        WAIT_S,
        "a worker that computed it after its start",
    )
    # An emptied Redis hears of it from the housekeeper, and of what is held from the workers.
    assert client.put("/v1/profiles/poet/pin", json={"copies": 1}).json["copies"] == 1
    connection.flushall()
    database = Database(settings().database)
    try:
        assert PinnedProfiles(database, wishes).renew() == 1
    finally:
        database.close()
    assert wishes.lasting() == {moved["static_profile_hash"]: 1}
    wait_until(lambda: holders() == [FIRST, SECOND], WAIT_S, "workers that reported all again")
    connection.close()
