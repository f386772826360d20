"""Redis away, full or without writes: refused with the reason, nothing half done, and back to work unaided."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app import build
from gateway_app.housekeeping import walk
from gateway_app.housekeeping.worker import make
from tasks.db import Database
from tasks.errors import QueueUnavailable
from tasks.queueing.publisher import Publisher
from tasks.schema import requests
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.services import RedisServer

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
TASK = {"agent": "incident-responder", "directive": "What now?"}


@pytest.fixture
def redis_url(own_redis: RedisServer) -> str:
    """Give each test here a Redis of its own, to be killed."""
    return own_redis.url


@SQLITE
def test_redis_away(client: FlaskClient, own_redis: RedisServer) -> None:
    """Refused with 503 and recorded as failed; taken again as soon as Redis is back."""
    assert client.post("/v1/tasks", json=TASK).status_code == 202
    own_redis.kill()
    answer = client.post("/v1/tasks", json=TASK)
    assert (answer.status_code, answer.json["code"]) == (503, "queue_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.json["retryable"] is True
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json["status"], "queue" in ready.json["missing"]) == (503, "unavailable", True)
    assert states() == ["queued"]
    own_redis.start()
    assert client.post("/v1/tasks", json=TASK).status_code == 202
    assert messages(own_redis.url) == 2


def test_redis_lost_between_commit_and_publish(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is accepted all the same: it is committed. A housekeeper queues it; without one it waits."""

    def lost(*_args: Any) -> None:
        raise QueueUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "publish", lost)
        answer = client.post("/v1/tasks", json=TASK)
    assert answer.status_code == 202
    assert (states(), messages(settings().gateway.request_queue_url)) == (["queued"], 0)
    monkeypatch.setattr(walk, "GRACE_S", -1.0)
    with ExitStack() as closing:
        make(settings(), closing).round()
    assert (states(), messages(settings().gateway.request_queue_url)) == (["queued"], 1)


#: What keeps Redis from taking writes, and what ends that.
REFUSING = {
    "a replica": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    "out of memory": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
}


@SQLITE
@pytest.mark.parametrize("state", REFUSING)
def test_redis_takes_no_writes(client: FlaskClient, own_redis: RedisServer, state: str) -> None:
    """New work is refused, what was accepted stays, and is cancelled if that is asked for; taken again afterwards."""
    accepted = [client.post("/v1/tasks", json=TASK).get_json() for _ in range(2)]
    begin, end = REFUSING[state]
    with redis.Redis.from_url(own_redis.url) as server:
        server.execute_command(*begin)
        answer = client.post("/v1/tasks", json=TASK)
        assert (answer.status_code, answer.json["code"]) == (503, "queue_unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        ready = client.get("/readyz")
        assert (ready.status_code, "queue" in ready.json["missing"]) == (503, True)
        assert client.delete(accepted[0]["links"]["self"]).status_code == 200
        server.execute_command(*end)
    assert client.post("/v1/tasks", json=TASK).status_code == 202
    assert states() == ["cancelled", "queued", "queued"]
    assert client.get("/readyz").status_code == 200


@SQLITE
def test_what_waits_can_be_cancelled_without_redis(client: FlaskClient, own_redis: RedisServer) -> None:
    """The database decides. And whoever asks again with the same key hears that the request was taken."""
    key = {"Idempotency-Key": "once"}
    accepted = [client.post("/v1/tasks", json=TASK, headers=headers).get_json() for headers in (key, {})]
    own_redis.kill()
    again = client.post("/v1/tasks", json=TASK, headers=key)
    assert (again.status_code, again.json["id"]) == (202, accepted[0]["id"])
    for task in accepted:
        answer = client.delete(task["links"]["self"])
        assert (answer.status_code, answer.json["status"]) == (200, "cancelled")
        assert "event: cancelled" in client.get(task["links"]["events"]).text
    assert states() == ["cancelled"] * 2
    own_redis.start()
    assert client.post("/v1/tasks", json=TASK).status_code == 202


@SQLITE
def test_a_full_queue(client: FlaskClient, monkeypatch: pytest.MonkeyPatch, own_redis: RedisServer) -> None:
    """Refused with 429 and recorded; the gateway calls itself unready before that. Whoever asks again with the key of
    a request that was taken hears so. A client that cancels makes room.
    """
    with limited(client, monkeypatch, MAX_WAITING="10") as full:
        taken = [full.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": str(number)}) for number in range(8)]
        assert full.get("/readyz").status_code == 200
        taken += [full.post("/v1/tasks", json=TASK)]
        ready = full.get("/readyz")
        assert (ready.status_code, ready.json["missing"][0]) == (503, "queue")
        assert "nearly full: 90%" in ready.json["checks"]["queue"]
        taken += [full.post("/v1/tasks", json=TASK)]
        assert [answer.status_code for answer in taken] == [202] * 10
        answer = full.post("/v1/tasks", json=TASK)
        assert (answer.status_code, answer.json["code"], answer.json["retryable"]) == (429, "queue_full", True)
        assert int(answer.headers["Retry-After"]) > 0
        again = full.post("/v1/tasks", json=TASK, headers={"Idempotency-Key": "3"})
        assert (again.status_code, again.json["id"]) == (202, taken[3].json["id"])
        assert (messages(own_redis.url), states()) == (10, ["queued"] * 10)


@SQLITE
@pytest.mark.parametrize(
    ("limit", "others"),
    [("MAX_WAITING_TOKENS", 429), ("MAX_WAITING_PER_ORGANIZATION", 202), ("MAX_WAITING_TOKENS_PER_ORGANIZATION", 202)],
)
def test_every_limit(client: FlaskClient, monkeypatch: pytest.MonkeyPatch, limit: str, others: int) -> None:
    """Tokens and requests, of one organization and of all: another organization is held up by what is of all."""
    tokens = client.post("/v1/tasks", json=TASK).json["prompt_tokens"]
    most = 3 if limit == "MAX_WAITING_PER_ORGANIZATION" else 3 * tokens
    with limited(client, monkeypatch, **{limit: str(most)}) as full:
        answers = [full.post("/v1/tasks", json=TASK).status_code for _ in range(3)]
        assert answers == [202, 202, 429]
        other = full.post("/v1/tasks", json=TASK, headers={"Authorization": f"Bearer {new_key('other')}"})
        assert other.status_code == others


@contextmanager
def limited(client: FlaskClient, monkeypatch: pytest.MonkeyPatch, **limits: str) -> Iterator[FlaskClient]:
    """Return a client of a gateway with these limits, and the same key."""
    for name, value in limits.items():
        monkeypatch.setenv(f"{PREFIX}SCHEDULING__{name}", value)
    settings.cache_clear()
    app = build(settings())
    full = app.test_client()
    full.environ_base["HTTP_AUTHORIZATION"] = client.environ_base["HTTP_AUTHORIZATION"]
    with app.extensions["closing"]:
        yield full


def messages(url: str) -> int:
    """Return how many messages wait in the queue."""
    with redis.Redis.from_url(url) as queue:
        return int(queue.hlen("metaqore:gpu:messages"))


def states() -> list[str]:
    """Return the states of all stored requests."""
    database = Database(settings().database)
    try:
        return list(database.read(lambda connection: connection.execute(sa.select(requests.c.state)).scalars()))
    finally:
        database.close()
