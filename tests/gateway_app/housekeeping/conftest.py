"""A gateway whose Redis may lose things, and a housekeeper whose rounds the test calls for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app.housekeeping import walk
from gateway_app.housekeeping.housekeeper import Housekeeper
from gateway_app.housekeeping.worker import make
from tasks import lifecycle
from tasks.db import Database
from tasks.queueing.keys import QueueKeys
from tasks.queueing.publisher import Publisher
from tasks.schema import audit_events, requests
from tasks.settings import settings
from tests.services import RedisServer

TASK = {"agent": "incident-responder", "directive": "What now?"}


@dataclass(frozen=True)
class House:
    """A gateway without workers, its database and its Redis."""

    client: FlaskClient
    database: Database
    redis: redis.Redis
    publisher: Publisher

    def submit(self, **task: Any) -> str:
        """Submit a task; return its id."""
        answer = self.client.post("/v1/tasks", json=TASK | task)
        assert answer.status_code == 202, answer.text
        request_id: str = answer.get_json()["id"]
        return request_id

    def start(self, request_id: str, epoch: int = 1) -> None:
        """Begin an attempt, as a worker does."""
        begun = self.database.write(lambda on: lifecycle.start(on, request_id, epoch, "gpu@test", 3))
        assert isinstance(begun, lifecycle.Attempt)

    def row(self, request_id: str) -> Any:
        """Return a request's row."""
        query = sa.select(requests).where(requests.c.request_id == request_id)
        return self.database.read(lambda on: on.execute(query).one())

    def kinds(self, request_id: str) -> list[str]:
        """Return the kinds of a request's events, in order."""
        query = sa.select(audit_events.c.kind).where(audit_events.c.request_id == request_id)
        return self.database.read(lambda on: list(on.execute(query.order_by(audit_events.c.occurred_at)).scalars()))

    def queued(self, request_id: str, epoch: int) -> bool:
        """Tell whether Redis has the message of that epoch."""
        return self.publisher.unknown([f"{request_id}:{epoch}"]) == set()

    def rows(self) -> list[walk.OpenRequest]:
        """Return all open requests."""
        return self.database.read(lambda on: walk.page(on, "", 10_000))


@pytest.fixture
def redis_url(own_redis: RedisServer) -> str:
    """Give each test here a Redis of its own, to be emptied and killed."""
    return own_redis.url


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the housekeeper look at requests that were made this very moment."""
    monkeypatch.setattr(walk, "GRACE_S", -1.0)


@pytest.fixture
def house(client: FlaskClient, own_redis: RedisServer) -> Iterator[House]:
    """Return the gateway."""
    database = Database(settings().database)
    with redis.Redis.from_url(own_redis.url) as connection:
        yield House(client, database, connection, Publisher(connection, QueueKeys("metaqore:")))
    database.close()


MakeHousekeeper = Callable[[], Housekeeper]


@pytest.fixture
def make_housekeeper(house: House) -> Iterator[MakeHousekeeper]:
    """Return what makes housekeepers that are not started."""
    del house
    with ExitStack() as closing:
        yield lambda: make(settings(), closing)
