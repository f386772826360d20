"""A client that is not sure whether it was heard asks again with the same Idempotency-Key, and gets one request."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from gateway_app import build
from tasks.db import Database, now
from tasks.errors import QueueFull, QueueUnavailable
from tasks.queueing.publisher import Publisher
from tasks.schema import audit_events, idempotency_keys, requests
from tasks.settings import settings
from tests.conftest import ROOT, new_key
from tests.services import wait_until

TASK: dict[str, Any] = {"agent": "incident-responder", "directive": "What now?"}
KEY = "3b1f-the-same-again"
#: What a test does not need to be told by both databases.
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


def ask(client: FlaskClient, key: str | None = KEY, caller: str | None = None, **fields: Any) -> TestResponse:
    """Submit a task with a key."""
    headers = {"Authorization": f"Bearer {caller}"} if caller else {}
    headers |= {"Idempotency-Key": key} if key is not None else {}
    return client.post("/v1/tasks", json={**TASK, **fields}, headers=headers)


@pytest.fixture
def database(client: FlaskClient) -> Iterator[Database]:
    """Return the gateway's database."""
    database = Database(settings().database)
    yield database
    database.close()


def count(database: Database, table: sa.Table) -> int:
    """Return how many rows a table has."""
    query = sa.select(sa.func.count()).select_from(table)
    return database.read(lambda connection: int(connection.execute(query).scalar_one()))


def failed_with(database: Database, request_id: str) -> list[str]:
    """Return the codes that a request's failures are recorded with."""
    mine = (audit_events.c.request_id == request_id, audit_events.c.kind == "failed")
    query = sa.select(audit_events.c.code).where(*mine)
    return database.read(lambda connection: list(connection.execute(query).scalars()))


def waiting() -> int:
    """Return how many messages wait in the queue."""
    with redis.Redis.from_url(settings().gateway.request_queue_url) as client:
        return sum(client.llen(key) for key in client.scan_iter("metaqore:gpu:list:*"))


def test_the_same_again(client: FlaskClient, database: Database) -> None:
    """The same answer, with a header that says so; nothing more is stored, recorded or queued."""
    first = ask(client)
    before = [count(database, table) for table in (requests, audit_events, idempotency_keys)]
    for again in (ask(client) for _ in range(3)):
        assert (again.status_code, again.get_json(), again.headers["Location"]) == (
            202,
            first.get_json(),
            first.headers["Location"],
        )
        assert again.headers["Idempotent-Replayed"] == "true"
    assert "Idempotent-Replayed" not in first.headers
    assert [count(database, table) for table in (requests, audit_events, idempotency_keys)] == before == [1, 2, 1]
    assert waiting() == 1


@SQLITE
def test_another_body_with_the_same_key(client: FlaskClient, database: Database) -> None:
    """It is a conflict, which is recorded; the first request stays what it was. Byte for byte: JSON that means the same
    is another body.
    """
    first = ask(client)
    for content in (json.dumps({**TASK, "directive": "And now?"}), json.dumps(TASK, indent=1)):
        answer = client.post(
            "/v1/tasks", data=content, content_type="application/json", headers={"Idempotency-Key": KEY}
        )
        assert (answer.status_code, answer.json["code"]) == (409, "idempotency_conflict")
        failed = client.get(f"/v1/tasks/{answer.json['request_id']}")
        assert failed.status_code == 404
        assert failed_with(database, answer.json["request_id"]) == ["idempotency_conflict"]
    assert ask(client).json["id"] == first.json["id"]
    assert (count(database, requests), waiting()) == (1, 1)


@SQLITE
def test_other_keys_and_other_organizations(client: FlaskClient) -> None:
    """Each has requests of its own; without a key, each request is a new one."""
    other = new_key("other")
    answers = [ask(client), ask(client, "another"), ask(client, caller=other), ask(client, None), ask(client, None)]
    assert len({answer.json["id"] for answer in answers}) == 5
    assert ask(client, caller=other, directive="And now?").status_code == 409
    assert ask(client, KEY.upper()).json["id"] not in {answer.json["id"] for answer in answers}


@SQLITE
def test_a_key_is_shared_by_all_of_an_organizations_api_keys(client: FlaskClient) -> None:
    """Whichever of its processes asks again."""
    assert ask(client).json["id"] == ask(client, caller=new_key("default")).json["id"]


@SQLITE
def test_a_key_is_not_stored_in_the_open(client: FlaskClient, database: Database) -> None:
    """It may be an order's number, or a person's name."""
    ask(client)
    row = database.read(lambda on: on.execute(sa.select(idempotency_keys)).one())
    assert len(row.key_hash) == len(row.body_hash) == 32
    assert KEY not in str(tuple(row))


@SQLITE
@pytest.mark.parametrize("key", ["", " ", "x" * 256, "tab\there", "ü\x7f"])
def test_what_is_no_key(client: FlaskClient, database: Database, key: str) -> None:
    """It is refused, and recorded."""
    answer = ask(client, key)
    assert (answer.status_code, answer.json["code"]) == (422, "invalid_request")
    assert (count(database, requests), count(database, audit_events)) == (0, 2)


@SQLITE
def test_the_longest_key(client: FlaskClient) -> None:
    """255 characters, and blanks in between."""
    key = "a b" * 85
    assert ask(client, key).json["id"] == ask(client, key).json["id"]


# --- What was not taken, and what has ended -------------------------------------------------------


@SQLITE
def test_a_refused_request_uses_up_no_key(client: FlaskClient) -> None:
    """After the mistake is corrected, the key is as good as new."""
    assert ask(client, agent="nobody").status_code == 404
    assert ask(client, sampling={"max_tokens": 100_000}).status_code == 422
    assert ask(client).status_code == 202


def test_a_request_that_was_not_published(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken all the same, and whoever asks again hears of it: publishing it is the housekeeper's task now."""

    def lost(*_args: Any) -> None:
        raise QueueUnavailable

    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "publish", lost)
        first = ask(client)
    assert (first.status_code, waiting()) == (202, 0)
    again = ask(client)
    assert (again.status_code, again.json["id"], waiting()) == (202, first.json["id"], 0)
    assert again.headers["Idempotent-Replayed"] == "true"


@SQLITE
def test_a_request_for_which_there_is_no_room(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was not taken, and says that one may try again: that works with the same key."""

    def full(*_args: Any) -> None:
        raise QueueFull(retry_after_s=7)

    with monkeypatch.context() as patched:
        patched.setattr(Publisher, "room", full)
        refused = ask(client)
    assert (refused.status_code, refused.json["code"], refused.headers["Retry-After"]) == (429, "queue_full", "7")
    again = ask(client)
    assert again.status_code == 202
    assert again.json["id"] != refused.json["request_id"]
    assert waiting() == 1


@SQLITE
def test_what_has_ended_is_not_begun_again(client: FlaskClient) -> None:
    """Somebody cancelled it: the same key still means the same request."""
    first = ask(client)
    assert client.delete(first.json["links"]["self"]).status_code == 200
    assert ask(client).json["id"] == first.json["id"]
    assert client.get(first.json["links"]["self"]).json["status"] == "cancelled"


@SQLITE
def test_after_a_day_the_key_is_free(client: FlaskClient, database: Database) -> None:
    """The same key and body are a new request then."""
    first = ask(client)
    yesterday = now() - timedelta(hours=24, seconds=1)
    database.write(lambda on: on.execute(sa.update(idempotency_keys).values(created_at=yesterday)) and None)
    second = ask(client)
    assert second.json["id"] != first.json["id"]
    assert ask(client).json["id"] == second.json["id"]
    assert count(database, idempotency_keys) == 1


@SQLITE
def test_what_was_taken_needs_no_room_in_the_queue(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client asks again just because the gateway is overloaded: it hears that its request is in the queue."""
    first = ask(client)

    def away(*_args: Any) -> None:
        raise QueueUnavailable

    monkeypatch.setattr(Publisher, "room", away)
    assert ask(client).json["id"] == first.json["id"]
    assert ask(client, "another").status_code == 503
    assert ask(client, directive="And now?").json["code"] == "idempotency_conflict"


@SQLITE
def test_what_was_taken_in_time_was_in_time(client: FlaskClient) -> None:
    """A client that asks again after the deadline hears what became of its request, not that it is too late now."""
    deadline = now() + timedelta(seconds=0.7)
    first = ask(client, deadline=deadline.isoformat())
    assert first.status_code == 202, first.text
    wait_until(lambda: now() > deadline, 10, "the deadline")
    again = ask(client, deadline=deadline.isoformat())
    assert (again.status_code, again.json["id"]) == (202, first.json["id"])
    assert client.get(first.json["links"]["self"]).json["status"] == "expired"
    late = ask(client, "another", deadline=deadline.isoformat())
    assert (late.status_code, late.json["code"]) == (422, "deadline_passed")


# --- At once --------------------------------------------------------------------------------------

#: A gateway in a process of its own: it says that it is ready, waits for a line, asks once, and prints the answer.
PROCESS = """
import json, sys
from gateway_app import build
from tasks.settings import settings
app = build(settings())
client = app.test_client()
key, caller, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {caller}", "Idempotency-Key": key}
def ask(headers):
    return client.post("/v1/tasks", data=body, content_type="application/json", headers=headers)
ask({**headers, "Idempotency-Key": f"{key} before {id(app)}"})
print("ready", flush=True)
sys.stdin.readline()
answer = ask(headers)
print(json.dumps([answer.status_code, answer.get_json().get("id"), answer.headers.get("Idempotent-Replayed")]))
app.extensions["closing"].close()
"""


def test_asking_from_several_processes(configured: None) -> None:
    """Two gateways, processes of their own, are asked at once: one of them takes the request, and both tell its id."""
    caller = new_key("default")
    command = [sys.executable, "-c", PROCESS, KEY, caller, json.dumps(TASK)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in processes]
    assert {status for status, _, _ in answers} == {202}
    assert len({request_id for _, request_id, _ in answers}) == 1
    assert sorted(str(replayed) for _, _, replayed in answers) == ["None", "true"]


@pytest.mark.parametrize("bodies", ["xxxxxxxx", "xyxyxyxy"])
def test_asking_at_once(configured: None, bodies: str) -> None:
    """Through two gateways, four threads each: one request is taken and queued; everybody hears its id, or that the key
    was used for another one.
    """
    caller = new_key("default")
    apps = [build(settings()) for _ in range(2)]
    barrier = threading.Barrier(len(bodies))

    def one(number: int) -> tuple[int, str]:
        client = apps[number % 2].test_client()
        # Their profile is read before, so that they come as close together as can be.
        ask(client, f"before {number}", caller)
        barrier.wait(30)
        answer = ask(client, KEY, caller, directive=bodies[number])
        said: dict[str, Any] = answer.get_json()
        return answer.status_code, str(said["id" if answer.status_code == 202 else "code"])

    try:
        with ThreadPoolExecutor(len(bodies)) as threads:
            answers = list(threads.map(one, range(len(bodies))))
    finally:
        for app in apps:
            app.extensions["closing"].close()
    taken = {said for status, said in answers if status == 202}
    assert len(taken) == 1
    won = {bodies[number] for number, (status, _) in enumerate(answers) if status == 202}
    assert len(won) == 1
    for number, (status, said) in enumerate(answers):
        expected = (202, *taken) if bodies[number] in won else (409, "idempotency_conflict")
        assert (status, said) == expected
    assert waiting() == len(bodies) + 1
