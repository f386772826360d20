"""A request whose attempts fail, as each API tells of it: another attempt's text replaces the first one's, and the last leaves it dead.

A stand-in plays the workers, so that a test says when an attempt fails, and what it had said by then.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from tasks import lifecycle
from tasks.ids import new_request_id
from tasks.job import Piece
from tasks.schema import requests
from tasks.stream import Cursor, completed, delta, opening
from tests.services import wait_until
from tests.stand_in import StandIn, result

#: What is told is the same from both databases.
pytestmark = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
AGENT = "incident-responder"
TASK: dict[str, Any] = {"agent": AGENT, "directive": "What now?"}
CHAT = {"model": AGENT, "messages": [{"role": "user", "content": "What now?"}]}
RESPONSE = {"model": AGENT, "input": "What now?"}
WHOLE = result(Piece(text="Reboot"), Piece(text=" it."))


@pytest.fixture
def worker(client: FlaskClient) -> Iterator[StandIn]:
    """Return the stand-in for the workers."""
    with closing(StandIn()) as worker:
        yield worker


class Asking:
    """A client that asks in a thread of its own, and reads what comes."""

    def __init__(self, client: FlaskClient, worker: StandIn, path: str, body: Any, key: str | None = None) -> None:
        self._since = new_request_id()
        self._worker = worker
        self.text = ""
        self.status = 0
        self._thread = threading.Thread(target=self._ask, args=(client, path, body, key))
        self._thread.start()

    def _ask(self, client: FlaskClient, path: str, body: Any, key: str | None) -> None:
        headers = {"Idempotency-Key": key} if key else {}
        answer = client.post(path, json=body, headers=headers, buffered=False)
        self.status = answer.status_code
        for chunk in answer.iter_encoded():
            self.text += chunk.decode()

    def request_id(self) -> str:
        """Return the id of the request that it made."""
        query = sa.select(requests.c.request_id).where(requests.c.request_id > self._since)
        database = self._worker.database
        return str(wait_until(lambda: database.read(lambda c: c.execute(query).scalar()), 20, "the request"))

    def until(self, text: str) -> None:
        """Wait until this text has come."""
        wait_until(lambda: text in self.text, 20, f"{text} to be sent")

    def data(self) -> list[Any]:
        """Return the events that came in all, once the answer has ended."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        lines = [line.removeprefix("data: ") for line in self.text.splitlines() if line.startswith("data: ")]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def whole(self) -> Any:
        """Return the document that came, once it has ended."""
        self._thread.join(30)
        return json.loads(self.text)


def kill(worker: StandIn, request_id: str) -> None:
    """Have every attempt fail."""
    for number in range(1, 4):
        attempt = worker.start(request_id)
        worker.send(request_id, opening(attempt.number), delta(Cursor(attempt.number, 1), f"half {number}"))
        assert worker.give_back(attempt, "engine_dead") == ("queued" if number < 3 else "dead")


def test_a_native_stream_begins_again(client: FlaskClient, worker: StandIn) -> None:
    """The task is queued between its attempts; the second begins with a reset, also for who comes back in between."""
    task = client.post("/v1/tasks", json=TASK).get_json()
    first = worker.start(task["id"])
    worker.send(task["id"], opening(1), delta(Cursor(1, 1), "Rebo"))
    assert worker.give_back(first, "engine_failed") == "queued"
    shown = client.get(task["links"]["self"]).get_json()
    assert (shown["status"], shown["attempt"], "error" in shown) == ("queued", 1, False)
    second = worker.start(task["id"])
    worker.record(second, WHOLE)
    frames = [opening(2), *(delta(Cursor(2, n), piece) for n, piece in enumerate(WHOLE.pieces, 1))]
    worker.send(task["id"], *frames, completed(Cursor(2, 3), WHOLE))
    for cursor, expected in (
        ("", ["started", "delta", "reset", "delta", "delta", "completed"]),
        ("1-1", ["reset", "delta", "delta", "completed"]),
        ("2-1", ["delta", "completed"]),
    ):
        text = client.get(f"{task['links']['events']}?cursor={cursor}").get_data(as_text=True)
        assert [line.split(": ")[1] for line in text.splitlines() if line.startswith("event: ")] == expected
    shown = client.get(task["links"]["self"]).get_json()
    assert (shown["status"], shown["attempt"], shown["result"]["text"]) == ("completed", 2, "Reboot it.")
    recorded = client.get(f"/v1/audit/events?request_id={task['id']}&order=asc").get_json()["data"]
    assert [event["event_type"] for event in recorded] == [
        "received", "routing_decision", "started", "requeued", "started", "completed",
    ]  # fmt: skip
    assert recorded[3]["payload"]["code"] == "engine_failed"


@pytest.mark.parametrize(
    ("path", "body", "texts"),
    [
        ("/v1/chat/completions", CHAT, lambda event: (event["choices"] or [{"delta": {}}])[0]["delta"].get("content")),
        ("/v1/responses", RESPONSE, lambda event: event.get("delta")),
    ],
)
def test_an_openai_stream_goes_on(
    client: FlaskClient, worker: StandIn, path: str, body: dict[str, Any], texts: Callable[[Any], str | None]
) -> None:
    """What was said is not said again, and nothing tells of the first attempt."""
    asking = Asking(client, worker, path, {**body, "stream": True})
    request_id = asking.request_id()
    first = worker.start(request_id)
    worker.send(request_id, opening(1), delta(Cursor(1, 1), "Rebo"))
    asking.until("Rebo")
    assert worker.give_back(first, "engine_dead") == "queued"
    second = worker.start(request_id)
    worker.send(request_id, opening(2), *(delta(Cursor(2, n), piece) for n, piece in enumerate(WHOLE.pieces, 1)))
    asking.until(" it.")
    worker.record(second, WHOLE)
    worker.send(request_id, completed(Cursor(2, 3), WHOLE))
    assert "".join(filter(None, map(texts, asking.data()))) == "Reboot it."
    assert "reset" not in asking.text


def test_a_dead_task(client: FlaskClient, worker: StandIn) -> None:
    """It is shown with its code, listed, told on the stream, and cannot be cancelled; the record says why."""
    task = client.post("/v1/tasks", json=TASK).get_json()
    kill(worker, task["id"])
    shown = client.get(task["links"]["self"]).get_json()
    assert (shown["status"], shown["attempt"], shown["error"]["code"]) == ("dead", 3, "attempts_exhausted")
    assert shown["error"]["retryable"] is False
    assert [row["id"] for row in client.get("/v1/tasks?status=dead").get_json()["data"]] == [task["id"]]
    assert client.get("/v1/tasks?status=failed").get_json()["data"] == []
    text = client.get(task["links"]["events"]).get_data(as_text=True)
    events = [line.split(": ")[1] for line in text.splitlines() if line.startswith("event: ")]
    assert events == ["started", "delta", "reset", "delta", "reset", "delta", "dead"]
    assert '"code":"attempts_exhausted"' in text
    refused = client.delete(task["links"]["self"])
    assert (refused.status_code, refused.get_json()["code"]) == (409, "already_finished")
    recorded = client.get(f"/v1/audit/events?request_id={task['id']}&kind=dead").get_json()["data"]
    assert [event["payload"]["details"] for event in recorded] == [{"last_code": "engine_dead"}]


def test_a_dead_task_that_redis_forgot(client: FlaskClient, worker: StandIn) -> None:
    """Its stream is its end alone, made from SQL."""
    task = client.post("/v1/tasks", json=TASK).get_json()
    kill(worker, task["id"])
    worker.redis.flushall()
    text = client.get(task["links"]["events"]).get_data(as_text=True)
    assert [line for line in text.splitlines() if line.startswith("event: ")] == ["event: dead"]


def test_a_dead_completion(client: FlaskClient, worker: StandIn) -> None:
    """An error like that of a failed one, with the code; clients are told not to try again by themselves."""
    asking = Asking(client, worker, "/v1/chat/completions", CHAT)
    kill(worker, asking.request_id())
    error = asking.whole()["error"]
    assert (asking.status, error["code"], error["retryable"]) == (502, "attempts_exhausted", False)


def test_a_dead_completion_in_chunks(client: FlaskClient, worker: StandIn) -> None:
    """The stream ends with the error, after what was said once by each attempt."""
    asking = Asking(client, worker, "/v1/chat/completions", {**CHAT, "stream": True})
    request_id = asking.request_id()
    for number in range(1, 4):
        attempt = worker.start(request_id)
        worker.send(request_id, opening(number), delta(Cursor(number, 1), "Rebo"))
        asking.until("Rebo")
        worker.give_back(attempt, "engine_dead")
    assert asking.data()[-1]["error"]["code"] == "attempts_exhausted"
    assert asking.text.count("Rebo") == 1


def test_a_dead_response(client: FlaskClient, worker: StandIn) -> None:
    """OpenAI's clients know it as failed; polled and streamed alike."""
    made = client.post("/v1/responses", json={**RESPONSE, "background": True}).get_json()
    kill(worker, made["id"])
    shown = client.get(f"/v1/responses/{made['id']}").get_json()
    assert (shown["status"], shown["error"]["type"]) == ("failed", "attempts_exhausted")
    text = client.get(f"/v1/responses/{made['id']}?stream=true").get_data(as_text=True)
    assert [line for line in text.splitlines() if line.startswith("event: ")][-1] == "event: response.failed"


def test_the_key_of_a_dead_task(client: FlaskClient, worker: StandIn) -> None:
    """Asking again with the same key begins nothing: it tells of the task that is dead. Another body is a conflict."""
    headers = {"Idempotency-Key": "the same"}
    task = client.post("/v1/tasks", json=TASK, headers=headers).get_json()
    kill(worker, task["id"])
    again = client.post("/v1/tasks", json=TASK, headers=headers)
    assert (again.get_json()["id"], again.headers["Idempotent-Replayed"]) == (task["id"], "true")
    other = client.post("/v1/tasks", json={**TASK, "directive": "And now?"}, headers=headers)
    assert (other.status_code, other.get_json()["code"]) == (409, "idempotency_conflict")


def test_the_key_of_a_dead_completion(client: FlaskClient, worker: StandIn) -> None:
    """The same error is the answer, without another attempt."""
    first, again = (Asking(client, worker, "/v1/chat/completions", CHAT, "once") for _ in range(2))
    kill(worker, first.request_id())
    for asking in (first, again, Asking(client, worker, "/v1/chat/completions", CHAT, "once")):
        error = asking.whole()["error"]
        assert (asking.status, error["code"], error["request_id"]) == (502, "attempts_exhausted", first.request_id())


def test_pages_of_the_record_pass_what_came_back_twice(client: FlaskClient, worker: StandIn) -> None:
    """An attempt that was handed back, and then lost by Redis: both events have names, and a page goes on after each."""
    task = client.post("/v1/tasks", json=TASK).get_json()
    assert worker.give_back(worker.start(task["id"]), "worker_draining") == "queued"
    for epoch in (1, 2):
        worker.database.write(lambda c, epoch=epoch: lifecycle.republish(c, task["id"], epoch, 1, max_epochs=9))  # type: ignore[misc]
    path, names = f"/v1/audit/events?request_id={task['id']}&order=asc&limit=1", []
    page = client.get(path).get_json()
    while page["data"]:
        names.append(page["data"][0]["id"].removeprefix(f"{task['id']}."))
        page = client.get(f"{path}&after={page['data'][0]['id']}").get_json()
    assert names == ["received.0", "admitted.0", "started.1", "requeued.1.1", "requeued.1.2", "requeued.1.3"]
