"""What a profile may share with others, on its way: to the workers, to the queue, and there again after Redis lost it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app import build
from tasks import lifecycle
from tasks.crypto import KeyWrapper, Signer
from tasks.db import Database
from tasks.job import Chain
from tasks.prompts.tokenizer import ModelTokenizer
from tasks.queueing.keys import QueueKeys
from tasks.queueing.message import MessageCodec
from tasks.queueing.pull import chain_text
from tasks.schema import profiles
from tasks.settings import settings
from tests.gateway_app.kv_cache.reported import make
from tests.profile_calls import connected
from worker_gpu.profiles import StaticPart, StaticParts


@pytest.fixture
def database(client: FlaskClient) -> Iterator[Database]:
    """Return the gateway's database."""
    del client
    with closing(Database(settings().database)) as database:
        yield database


def part(database: Database, model: Path, agent: str) -> tuple[str, StaticPart]:
    """Return what a worker finds of an agent's profile, and its hash."""
    query = sa.select(profiles.c.static_profile_hash).where(profiles.c.agent_name == agent)
    name: str = database.read(lambda on: on.execute(query).scalar_one())
    keys = KeyWrapper(settings().secrets.keys("master_key"))
    return name, asyncio.run(StaticParts(database, keys, ModelTokenizer(model).fingerprint).get(name))


def submit(client: FlaskClient, agent: str) -> str:
    """Submit a task; return its id."""
    answer = client.post("/v1/tasks", json={"agent": agent, "directive": "What now?"})
    assert answer.status_code == 202, answer.text
    return cast("str", answer.get_json()["id"])


def header(client: redis.Redis, request_id: str, epoch: int) -> list[Any]:
    """Return what the queue knows of a message."""
    name = QueueKeys(settings().gateway.key_prefix).named("messages")
    record = cast("bytes", client.hget(name, f"{request_id}:{epoch}"))
    return cast("list[Any]", json.loads(record.partition(b"\n")[0]))


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_workers_find_it(client: FlaskClient, database: Database, tiny_model: Path) -> None:
    """With the ids, which are the same as far as chains are; and whose profile it is."""
    make(client, "poet", "Poet.")
    make(client, "painter", "Painter.")
    (_, poet), (_, painter) = part(database, tiny_model, "poet"), part(database, tiny_model, "painter")
    ((link, tokens),) = poet.chain
    assert painter.chain == poet.chain
    assert (len(link), poet.organization) == (32, "default")
    assert 16 < tokens < len(poet.token_ids)
    assert poet.token_ids[:tokens] == painter.token_ids[:tokens]


def test_the_queue_is_told(client: FlaskClient, database: Database, redis_url: str, tiny_model: Path) -> None:
    """When a request comes, and when the housekeeper queues it again."""
    make(client, "poet", "Poet.")
    name, static = part(database, tiny_model, "poet")
    request_id = submit(client, "poet")
    with redis.Redis.from_url(redis_url) as queue:
        told = header(queue, request_id, 1)
    assert told[1] == name
    assert told[4:6] == [len(static.token_ids), chain_text(static.chain)]
    again = database.write(lambda on: lifecycle.republish(on, request_id, 1, 0, max_epochs=20))
    assert again is not None
    secrets = settings().secrets
    codec = MessageCodec(Signer(secrets.keys("signing_key")), KeyWrapper(secrets.keys("master_key")))
    queued = codec.again(again)
    assert (queued.static_tokens, queued.chain) == (len(static.token_ids), static.chain)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_request_without_a_profile(client: FlaskClient, database: Database, redis_url: str) -> None:
    """Has no static part, and nothing that could be shared."""
    answer = client.post(
        "/v1/responses", json={"model": settings().engine.model_name, "input": "Hello?", "background": True}
    )
    assert answer.status_code == 200, answer.text
    request_id = answer.headers["X-Request-Id"]
    with redis.Redis.from_url(redis_url) as queue:
        assert header(queue, request_id, 1)[4:6] == [0, ""]
    again = database.write(lambda on: lifecycle.republish(on, request_id, 1, 0, max_epochs=20))
    assert again is not None
    assert (again.static_tokens, again.chain) == (0, ())


def test_a_profile_of_release_0_1_0(client: FlaskClient, database: Database, tiny_model: Path) -> None:
    """It was stored without a chain, which it gets when a gateway meets it, or it is activated again."""
    make(client, "poet", "Poet.")
    name, static = part(database, tiny_model, "poet")

    def forget() -> None:
        old = sa.update(profiles).values(chain=sa.null())
        database.write(lambda on: on.execute(old) and None)

    def found() -> Chain:
        return part(database, tiny_model, "poet")[1].chain

    forget()
    assert found() == ()
    app = build(settings())
    with app.extensions["closing"]:
        submit(connected(app, client.environ_base["HTTP_AUTHORIZATION"].removeprefix("Bearer ")), "poet")
    assert found() == static.chain
    forget()
    assert client.post("/v1/profiles/poet/activate", json={"version": 1}).status_code == 200
    assert found() == static.chain
    request_id = submit(client, "poet")
    again = database.write(lambda on: lifecycle.republish(on, request_id, 1, 0, max_epochs=20))
    assert again is not None
    assert (again.static_profile_hash, again.static_tokens) == (name, len(static.token_ids))
