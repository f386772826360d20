"""A stream's frames are the same wherever they come from: Redis, SQL, or the one and then the other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal, cast

import pytest
import redis
from flask.testing import FlaskClient

from tasks import lifecycle, requests_read
from tasks.crypto import KeyWrapper, seal
from tasks.db import Database, now
from tasks.job import Piece, Result, Timings, TokenLogprob, ToolCallDelta, Usage
from tasks.lifecycle import Attempt
from tasks.settings import PREFIX, settings
from tasks.stream import FIELD, Cursor, Frame, ended, replay, stream_key

TASK = {"agent": "incident-responder", "directive": "What now?"}
LOGPROB = TokenLogprob.model_validate({"token": "thrée", "logprob": -0.25, "top": [("four", -1.75)]})
RESULT = Result(
    pieces=(
        Piece(text="One "),
        Piece(text="two "),
        Piece(text="", tool_calls=(ToolCallDelta(index=0, id="call_1", name="reboot", arguments='{"host": "'),)),
        Piece(text="thrée ", choice=1, logprobs=(LOGPROB,)),
        Piece(tool_calls=(ToolCallDelta(index=0, arguments='db-1"}'),)),
        Piece(text="🙂", choice=1),
    ),
    finish_reasons=("tool_calls", "stop"),
    model="tiny",
    usage=Usage(prompt_tokens=9, cached_tokens=0, output_tokens=4),
    timings=Timings(queued_ms=1, total_ms=2),
)
PARTIAL = RESULT.model_copy(update={"pieces": RESULT.pieces[:4], "finish_reasons": ()})
Said = Literal["completed", "cancelled", "expired"]


class Task:
    """A task that the test runs in a worker's place."""

    def __init__(self, client: FlaskClient) -> None:
        accepted: dict[str, Any] = client.post("/v1/tasks", json=TASK).get_json()
        self.id: str = accepted["id"]
        self.client = client
        self.database = Database(settings().database)
        row = self.database.read(lambda connection: requests_read.find(connection, self.id, "default"))
        assert row is not None
        self.data_key = KeyWrapper(settings().secrets.keys("master_key")).unwrap(row.data_key, self.id)
        self.redis = redis.Redis.from_url(settings().gateway.request_queue_url)

    def start(self) -> Attempt:
        """Begin an attempt."""
        started = self.database.write(lambda connection: lifecycle.start(connection, self.id, 1, "test", 3))
        assert isinstance(started, Attempt)
        return started

    def complete(self, attempt: Attempt, state: Said = "completed") -> None:
        """Record the answer, or what there was of it when it was stopped."""
        result = RESULT if state == "completed" else PARTIAL
        sealed = seal(self.data_key, result.model_dump_json(exclude_defaults=True).encode(), f"result:{self.id}")
        assert self.database.write(lambda on: lifecycle.answer(on, attempt, result, sealed, state))

    def send(self, *frames: Frame) -> None:
        """Write frames to the stream."""
        for frame in frames:
            sealed = frame.seal(self.data_key, self.id)
            self.redis.xadd(stream_key("metaqore:", self.id), {FIELD: sealed}, id=str(frame.cursor))

    def watch(self, cursor: Cursor | str = "") -> list[str]:
        """Return the stream's events from a cursor on, as they are sent."""
        headers = {"Last-Event-ID": str(cursor)} if cursor else {}
        answer = self.client.get(f"/v1/tasks/{self.id}/events", headers=headers)
        assert answer.status_code in (200, 204), answer.text
        return [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]


@pytest.fixture
def task(client: FlaskClient) -> Iterator[Task]:
    """Return a queued task."""
    task = Task(client)
    yield task
    task.database.close()
    task.redis.close()


@pytest.mark.parametrize("state", ["completed", "cancelled", "expired"])
def test_every_cursor_gives_the_rest(task: Task, state: Said) -> None:
    """From Redis and from SQL, byte for byte the same, whether the answer came to its end or was stopped."""
    attempt = task.start()
    code = None if state == "completed" else state
    frames = list(replay(1, RESULT if state == "completed" else PARTIAL, state, code))
    task.send(*frames)
    task.complete(attempt, state)
    whole = task.watch()
    assert len(whole) == len(frames)
    assert f"event: {state}" in whole[-1]
    for forgotten in (False, True):
        if forgotten:
            task.redis.flushall()
            assert task.watch() == whole
        for index, frame in enumerate(frames):
            assert task.watch(frame.cursor) == whole[index + 1 :]


def test_a_cursor_past_the_end_is_refused(task: Task) -> None:
    """The end itself is answered with 204, so that a browser stops asking."""
    task.complete(task.start())
    last = list(replay(1, RESULT))[-1].cursor
    assert task.client.get(f"/v1/tasks/{task.id}/events?cursor={last}").status_code == 204
    answer = task.client.get(f"/v1/tasks/{task.id}/events?cursor=1-{last.sequence + 1}")
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_cursor")


def test_a_worker_that_died_after_its_commit(task: Task) -> None:
    """The last frame was never sent: it is made from SQL, after what Redis has."""
    frames = list(replay(1, RESULT))
    attempt = task.start()
    task.send(*frames[:2])
    task.complete(attempt)
    assert len(task.watch()) == len(frames)
    assert task.watch(frames[1].cursor)[-1].startswith(f"id: {frames[-1].cursor}\nevent: completed")


def test_the_same_while_watching(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher that hears nothing looks into SQL, and sees the rest."""
    frames = list(replay(1, RESULT))
    attempt = task.start()
    task.send(*frames[:2])
    answer = task.client.get(f"/v1/tasks/{task.id}/events", buffered=False)
    events = cast("Iterator[bytes]", iter(answer.response))
    assert next(events).startswith(b":")
    seen = [next(events), next(events)]
    task.complete(attempt)
    began = time.monotonic()
    seen += [event for event in events if not event.startswith(b":")]
    assert time.monotonic() - began < 5
    assert [event.decode().rstrip("\n") for event in seen] == task.watch()


def test_a_second_attempt_replaces_the_first(task: Task) -> None:
    """A client that comes back with a cursor of the first attempt is told to begin again."""
    first = task.start()
    task.send(*list(replay(1, RESULT))[:3])
    second = task.start()
    assert second.number == first.number + 1
    frames = list(replay(2, RESULT))
    task.send(*frames)
    task.complete(second)
    after = task.watch(Cursor(1, 2))
    assert after[0].startswith("id: 2-0\nevent: reset")
    assert len(after) == len(frames)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_failed_task_ends_after_whatever_was_shown(task: Task, forgotten: bool) -> None:
    """The end of a task without an answer follows every cursor."""
    attempt = task.start()
    task.send(*list(replay(1, RESULT))[:3])
    task.database.write(lambda connection: lifecycle.finish(connection, attempt, "failed", code="engine_failed"))
    task.send(ended(1, "failed", "engine_failed"))
    if forgotten:
        task.redis.flushall()
    last = task.watch(Cursor(1, 2))[-1]
    assert "event: failed" in last
    assert "engine_failed" in last


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_task_that_is_cancelled_between_two_attempts(task: Task, forgotten: bool) -> None:
    """Its end follows what the attempt that failed had shown, and that attempt's text is not taken for an answer."""
    attempt = task.start()
    task.send(*list(replay(1, RESULT))[:3])
    given = task.database.write(
        lambda connection: lifecycle.give_back(connection, attempt, "engine_dead", delay_s=60, max_attempts=3)
    )
    assert given == "queued"
    assert task.client.delete(f"/v1/tasks/{task.id}").status_code == 200
    if forgotten:
        task.redis.flushall()
    last = task.watch(Cursor(1, 2))[-1]
    assert "event: cancelled" in last
    shown = task.client.get(f"/v1/tasks/{task.id}").get_json()
    assert (shown["status"], shown["attempt"], "result" in shown) == ("cancelled", 1, False)


@pytest.mark.parametrize("state", ["cancelled", "expired"])
def test_what_was_said_before_it_was_stopped(task: Task, state: Said) -> None:
    """It is shown with the task, as far as it came, and no choice counts as finished."""
    task.complete(task.start(), state)
    shown = task.client.get(f"/v1/tasks/{task.id}").get_json()
    assert (shown["status"], shown["error"]["code"]) == (state, state)
    assert (shown["result"]["text"], shown["result"]["finish_reason"]) == ("One two ", None)
    assert [choice["text"] for choice in shown["result"]["choices"]] == ["One two ", "thrée "]
    assert shown["result"]["usage"]["output_tokens"] == 4


def test_a_watcher_learns_that_nobody_came_in_time(client: FlaskClient) -> None:
    """Without any worker: whoever looks at the task finds that it is too late, and so does whoever watches it."""
    deadline = now() + timedelta(seconds=4)
    accepted = client.post("/v1/tasks", json={**TASK, "deadline": deadline.isoformat()}).get_json()
    assert client.get(accepted["links"]["self"]).get_json()["status"] == "queued"
    text = client.get(accepted["links"]["events"]).text
    assert now() >= deadline
    events = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert [event.splitlines()[1] for event in events] == ["event: expired"]
    shown = client.get(accepted["links"]["self"]).get_json()
    assert (shown["status"], shown["error"]["code"]) == ("expired", "expired")
    assert client.get(accepted["links"]["events"]).text.endswith(events[0] + "\n\n")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, secrets_directory: object) -> None:
    """Have watchers look into SQL after a moment of silence."""
    monkeypatch.setenv(f"{PREFIX}STREAMING__HEARTBEAT_S", "0.2")
