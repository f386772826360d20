"""Cancelling at every stage: it takes effect at once, what was said is kept, and there is one end, told to everybody.

One gateway and one worker, processes of their own, serve most of these tests. The engine is slow: a token takes 50 ms,
and an answer has as many as a request allows.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import requests
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app import build
from tasks.queueing.heartbeats import INTERVAL_S
from tasks.queueing.keys import QueueKeys
from tasks.queueing.message import delivery_tag
from tasks.queueing.publisher import Publisher
from tasks.schema import TERMINAL_KINDS, TERMINAL_STATES, audit_events
from tasks.settings import PREFIX, settings
from tasks.stream import stream_key
from tests.fleet import Fleet, fleet
from tests.services import wait_until
from tests.stand_in import StandIn
from tests.workers import Worker

AGENT = "incident-responder"
TASK = {"agent": AGENT, "directive": "What now?"}
SLOTS = 4
#: Longer than any test waits.
FOREVER = 400
#: What the gateway promises, and what comes on top where a machine is busy with other tests.
PROMISED_S = 1.0
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Fleet]:
    """Return a gateway with a slow worker that has four slots, shared by this module's tests."""
    options = json.dumps({"time_scale": 10, "answer_tokens": 2 * FOREVER})
    folder = tmp_path_factory.mktemp("gateway")
    with fleet(folder, tiny_model, ENGINE__OPTIONS=options, ENGINE__MAX_NUM_SEQS=str(SLOTS)) as made:
        yield made


class Task:
    """A task of the shared gateway."""

    def __init__(self, gateway: Fleet, max_tokens: int = FOREVER, **fields: Any) -> None:
        self.gateway = gateway
        body = {**TASK, "sampling": {"max_tokens": max_tokens}, **fields}
        answer = requests.post(f"{gateway.url}/v1/tasks", json=body, headers=gateway.headers, timeout=PATIENCE_S)
        assert answer.status_code == 202, answer.text
        self.id: str = answer.json()["id"]
        self.url = f"{gateway.url}/v1/tasks/{self.id}"

    def show(self) -> dict[str, Any]:
        """Return it as the gateway shows it."""
        shown: dict[str, Any] = requests.get(self.url, headers=self.gateway.headers, timeout=PATIENCE_S).json()
        return shown

    def cancel(self) -> requests.Response:
        """Ask for its end."""
        return requests.delete(self.url, headers=self.gateway.headers, timeout=PATIENCE_S)

    def frames(self) -> Generator[dict[str, Any], None, None]:
        """Yield the frames of its stream as they come."""
        headers = self.gateway.headers
        with requests.get(f"{self.url}/events", headers=headers, stream=True, timeout=PATIENCE_S) as answer:
            frame: dict[str, Any] = {}
            for line in answer.iter_lines(chunk_size=1, decode_unicode=True):
                name, _, value = line.partition(": ")
                if name:
                    frame[name] = value
                elif "event" in frame:
                    yield {"id": frame["id"], "event": frame["event"], "data": json.loads(frame["data"])}
                    frame = {}

    def speaks(self) -> None:
        """Return when the first words have come."""
        with closing(self.frames()) as frames:
            assert any(frame["event"] == "delta" for frame in frames)

    def terminal_kinds(self) -> list[str]:
        """Return the kinds of its terminal events: there must be one."""
        return terminal_kinds(self.gateway.environment["DATABASE_URL"], self.id)

    def ends_as(self, state: str) -> dict[str, Any]:
        """Check that it ended like this, the same for everybody who looks; return it as shown."""
        wait_until(lambda: self.show()["status"] in TERMINAL_STATES, PATIENCE_S, "its end")
        shown = self.show()
        assert (shown["status"], self.terminal_kinds()) == (state, [state])
        frames = list(self.frames())
        assert [frame["event"] for frame in frames if frame["event"] in TERMINAL_STATES] == [state]
        assert frames[-1]["event"] == state
        text = "".join(frame["data"].get("text", "") for frame in frames)
        assert text == shown.get("result", {}).get("text", "")
        if state != "completed":
            assert (shown["error"]["code"], frames[-1]["data"]["code"]) == (state, state)
        return shown


def terminal_kinds(migrated_url: str, request_id: str) -> list[str]:
    """Return the kinds of a request's terminal events."""
    query = sa.select(audit_events.c.kind).where(
        audit_events.c.request_id == request_id, audit_events.c.kind.in_(TERMINAL_KINDS)
    )
    engine = sa.create_engine(migrated_url)
    with engine.connect() as connection:
        kinds = list(connection.execute(query).scalars())
    engine.dispose()
    return kinds


@pytest.fixture
def tasks(gateway: Fleet) -> Iterator[list[Task]]:
    """Return a list for the tasks that a test leaves running: they are cancelled at its end."""
    left: list[Task] = []
    yield left
    for task in left:
        task.cancel()
        wait_until(lambda task=task: task.show()["status"] in TERMINAL_STATES, PATIENCE_S, "its end")  # type: ignore[misc]


# --- Queued ---------------------------------------------------------------------------------------


def test_a_queued_task_ends_at_once(client: FlaskClient, migrated_url: str) -> None:
    """Without any worker. Who watches is told long before the next heartbeat, and so is who comes later."""
    accepted: dict[str, Any] = client.post("/v1/tasks", json=TASK).get_json()
    path, events = accepted["links"]["self"], accepted["links"]["events"]
    seen: list[tuple[float, str]] = []
    watching = threading.Event()

    def watch() -> None:
        for chunk in cast("Iterator[bytes]", client.get(events, buffered=False).response):
            seen.append((time.monotonic(), chunk.decode()))
            watching.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert watching.wait(PATIENCE_S)
    asked_at = time.monotonic()
    answer = client.delete(path)
    answered_at = time.monotonic()
    watcher.join(PATIENCE_S)
    print(f"answered after {answered_at - asked_at:.3f} s, watcher told after {seen[-1][0] - asked_at:.3f} s")
    shown: dict[str, Any] = answer.get_json()
    assert (answer.status_code, shown["status"], shown["error"]["code"]) == (200, "cancelled", "cancelled")
    assert (shown["attempt"], shown["cancelling"], "result" in shown) == (0, False, False)
    assert "event: cancelled" in seen[-1][1]
    assert seen[-1][0] - asked_at < settings().streaming.heartbeat_s / 2
    assert seen[-1][1] in client.get(events).text
    cursor = seen[-1][1].splitlines()[0].removeprefix("id: ")
    assert client.get(events, headers={"Last-Event-ID": cursor}).status_code == 204
    assert terminal_kinds(migrated_url, accepted["id"]) == ["cancelled"]


def test_redis_is_not_needed_to_cancel_what_waits(client: FlaskClient, redis_url: str) -> None:
    """Here it takes no more frames. The database decides, and watchers learn of it from there."""
    accepted: dict[str, Any] = client.post("/v1/tasks", json=TASK).get_json()
    with redis.Redis.from_url(redis_url) as full:
        full.config_set("maxmemory", 1)
        try:
            answer = client.delete(accepted["links"]["self"])
        finally:
            full.config_set("maxmemory", 0)
        assert full.exists(stream_key("metaqore:", accepted["id"])) == 0
    assert (answer.status_code, answer.json["status"]) == (200, "cancelled")
    assert "event: cancelled" in client.get(accepted["links"]["events"]).text


def test_what_is_cancelled_leaves_the_queue(client: FlaskClient, redis_url: str) -> None:
    """Both what waits for its first attempt and what waits for another: it takes no room any more, and reaches no worker."""
    accepted = [client.post("/v1/tasks", json=TASK).get_json() for _ in range(3)]
    with closing(StandIn()) as worker, redis.Redis.from_url(redis_url) as queue:
        publisher = Publisher(queue, QueueKeys("metaqore:"))
        again = worker.start(accepted[0]["id"])
        assert worker.give_back(again, "engine_failed") == "queued"
        assert publisher.load().requests == 3
        for task in accepted[:2]:
            answer = client.delete(task["links"]["self"])
            assert (answer.status_code, answer.json["status"]) == (200, "cancelled")
        assert publisher.load().requests == 1
        tags = [delivery_tag(task["id"], 1) for task in accepted]
        assert publisher.unknown(tags) == set(tags[:2])


def test_cancelling_again_is_no_error(client: FlaskClient) -> None:
    """It is cancelled already; nothing is recorded twice."""
    accepted: dict[str, Any] = client.post("/v1/tasks", json=TASK).get_json()
    answers = [client.delete(accepted["links"]["self"]) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.text for answer in answers}) == 1


def test_of_others_there_is_nothing_to_cancel(gateway: Fleet, tasks: list[Task]) -> None:
    """The answer is the same as for a task that never was, and the task goes on."""
    tasks.append(task := Task(gateway))
    task.speaks()
    stranger = {"Authorization": f"Bearer {gateway.other_key}"}
    unknown = task.url.replace(task.id, "gw_" + "0" * 12 + "7" + "0" * 3 + "8" + "0" * 15)
    answers = [requests.delete(url, headers=stranger, timeout=PATIENCE_S) for url in (task.url, unknown)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text == answers[1].text
    assert (task.show()["status"], task.show()["cancelling"]) == ("running", False)


# --- Running --------------------------------------------------------------------------------------


def test_a_running_task_ends_within_a_second(gateway: Fleet, tasks: list[Task]) -> None:
    """All slots are taken, and one more task waits. Cancelling frees a slot at once: what waits begins to speak. What was
    said is kept, with what it cost. The best of three times counts, as other tests may keep the machine busy.
    """
    running = [Task(gateway) for _ in range(SLOTS)]
    tasks += running
    for task in running:
        task.speaks()
    ended_s, freed_s = [], []
    for task in running[:3]:
        tasks.append(waiting := Task(gateway))
        time.sleep(0.3)
        assert waiting.show()["status"] == "queued"
        asked_at = time.monotonic()
        answer = task.cancel()
        ended_s.append(time.monotonic() - asked_at)
        assert answer.status_code in (200, 202)
        waiting.speaks()
        freed_s.append(time.monotonic() - asked_at)
        shown = task.ends_as("cancelled")
        assert shown["result"]["finish_reason"] is None
        assert shown["result"]["usage"]["output_tokens"] >= len(shown["result"]["text"].split()) > 0
        assert shown["result"]["usage"]["prompt_tokens"] > 0
        assert shown["result"]["timings"]["total_ms"] > shown["result"]["timings"]["first_token_ms"]
        assert answer.json()["status"] == ("cancelled" if answer.status_code == 200 else "running")
    print("ended after", [f"{s:.3f} s" for s in ended_s], "slot speaks again after", [f"{s:.3f} s" for s in freed_s])
    assert min(ended_s) < PROMISED_S
    # Its first token takes a step of the engine, and the worker may have to ask the queue once more.
    assert min(freed_s) < PROMISED_S + 1


def test_a_task_that_has_ended_is_not_cancelled(gateway: Fleet) -> None:
    """409 says how it ended; nothing of it changes."""
    task = Task(gateway, max_tokens=2)
    before = task.ends_as("completed")
    answer = task.cancel()
    assert (answer.status_code, answer.json()["code"]) == (409, "already_finished")
    assert "completed" in answer.json()["detail"]
    assert task.ends_as("completed") == before


def test_the_word_to_the_worker_is_lost(gateway: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis forgets who did not listen. The worker asks the database by itself, every two seconds."""
    task = Task(gateway)
    task.speaks()
    for name, value in gateway.environment.items():
        if name.startswith(PREFIX) or name in ("REDIS_URL", "DATABASE_URL"):
            monkeypatch.setenv(name, value)
    settings.cache_clear()
    silent: list[str] = []
    monkeypatch.setattr(Publisher, "stop", lambda _self, request_id: silent.append(request_id))
    app = build(settings())
    with app.extensions["closing"]:
        began = time.monotonic()
        answer = app.test_client().delete(f"/v1/tasks/{task.id}", headers=gateway.headers)
        assert answer.status_code in (200, 202)
        if answer.status_code == 202:
            assert (answer.json["status"], answer.json["cancelling"]) == ("running", True)
        wait_until(lambda: task.show()["status"] == "cancelled", PATIENCE_S, "the worker to notice")
        took_s = time.monotonic() - began
    print(f"noticed after {took_s:.3f} s")
    assert silent == [task.id]
    assert took_s < INTERVAL_S + PROMISED_S + 2
    task.ends_as("cancelled")


def test_a_deadline_while_it_runs(gateway: Fleet) -> None:
    """It expires in the middle of a word, and keeps what was said."""
    deadline = datetime.now(UTC) + timedelta(seconds=1.5)
    task = Task(gateway, deadline=deadline.isoformat())
    frames = list(task.frames())
    late_s = (datetime.now(UTC) - deadline).total_seconds()
    print(f"told {late_s:.3f} s after the deadline")
    assert frames[-1]["event"] == "expired"
    assert 0 <= late_s < PATIENCE_S / 2
    shown = task.ends_as("expired")
    assert shown["result"]["text"]
    assert shown["error"]["retryable"] is False
    answer = task.cancel()
    assert (answer.status_code, answer.json()["code"]) == (409, "already_finished")


def test_whoever_waits_for_the_answer_is_told(gateway: Fleet) -> None:
    """The client of a synchronous call gets an error that says so, whether it streams or not."""
    body = {"model": AGENT, "messages": [{"role": "user", "content": "What is on fire?"}], "max_tokens": FOREVER}
    url = f"{gateway.url}/v1/chat/completions"

    def ask(stream: bool) -> requests.Response:
        return requests.post(url, json={**body, "stream": stream}, headers=gateway.headers, timeout=PATIENCE_S)

    def running() -> list[str]:
        query = {"api": "chat", "status": "running"}
        answer = requests.get(f"{gateway.url}/v1/tasks", query, headers=gateway.headers, timeout=PATIENCE_S)
        return [row["links"]["self"] for row in answer.json()["data"]]

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask, stream) for stream in (False, True)]
        wait_until(lambda: len(running()) == len(asking), PATIENCE_S, "both calls to run")
        for path in running():
            requests.delete(gateway.url + path, headers=gateway.headers, timeout=PATIENCE_S)
        plain, streamed = (future.result(PATIENCE_S) for future in asking)
    assert (plain.status_code, plain.json()["error"]["code"]) == (409, "cancelled")
    assert plain.headers["x-should-retry"] == "false"
    last = json.loads(streamed.text.strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "cancelled"


# --- Whatever comes first -------------------------------------------------------------------------


def test_cancelling_at_any_moment(gateway: Fleet) -> None:
    """Forty tasks of random length, each cancelled at a random moment by one or two callers: one end each, and every
    caller was told the truth about it.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    plans = [(choose.randrange(1, 12), choose.uniform(0, 0.6), choose.choice([1, 1, 2])) for _ in range(40)]

    def run(plan: tuple[int, float, int]) -> tuple[Task, list[requests.Response]]:
        max_tokens, pause_s, callers = plan
        task = Task(gateway, max_tokens)
        time.sleep(pause_s)
        with ThreadPoolExecutor(callers) as threads:
            return task, list(threads.map(lambda _number: task.cancel(), range(callers)))

    with ThreadPoolExecutor(SLOTS + 2) as threads:
        outcomes = list(threads.map(run, plans))
    ends = []
    for task, answers in outcomes:
        for answer in answers:
            said = answer.json()
            if answer.status_code == 200:
                assert task.ends_as("cancelled")["status"] == said["status"]
            elif answer.status_code == 202:
                assert (said["status"], said["cancelling"]) == ("running", True)
            else:
                assert (answer.status_code, said["code"]) == (409, "already_finished")
                task.ends_as("completed")
        state = task.show()["status"]
        task.ends_as(state if state in TERMINAL_STATES else "cancelled")
        ends.append(task.show()["status"])
    print({state: ends.count(state) for state in set(ends)})
    assert set(ends) == {"cancelled", "completed"}


# --- The worker dies ------------------------------------------------------------------------------


@pytest.fixture
def worker(configured: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """Return a slow worker that a test may stop, kill and start again."""
    monkeypatch.setenv(f"{PREFIX}SCHEDULING__LEASE_S", "2")
    monkeypatch.setenv(f"{PREFIX}ENGINE__OPTIONS", json.dumps({"time_scale": 10, "answer_tokens": 2 * FOREVER}))
    worker = Worker(tmp_path / "worker.log")
    try:
        yield worker
    finally:
        worker.kill()


def frozen(worker: Worker) -> None:
    """Have the kernel stop the worker: it hears nothing more, and does not know it."""
    assert worker.process is not None
    os.kill(worker.process.pid, signal.SIGSTOP)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_worker_that_dies_before_it_heard_of_it(client: FlaskClient, worker: Worker, migrated_url: str) -> None:
    """The task is marked, and says so. The next worker that gets its message ends it without running it."""
    worker.start()
    wait_until(lambda: "worker" not in client.get("/readyz").json["missing"], PATIENCE_S, "a worker")
    body = {**TASK, "sampling": {"max_tokens": FOREVER}}
    accepted: dict[str, Any] = client.post("/v1/tasks", json=body).get_json()
    path = accepted["links"]["self"]
    wait_until(lambda: client.get(path).json["status"] == "running", PATIENCE_S, "the task to run")
    frozen(worker)
    answer = client.delete(path)
    assert (answer.status_code, answer.json["status"], answer.json["cancelling"]) == (202, "running", True)
    worker.kill()
    assert client.delete(path).status_code == 202
    worker.start()
    wait_until(lambda: client.get(path).json["status"] == "cancelled", PATIENCE_S, "the other worker to end it")
    shown = client.get(path).get_json()
    assert (shown["attempt"], shown["cancelling"], shown["error"]["code"]) == (1, False, "cancelled")
    assert terminal_kinds(migrated_url, accepted["id"]) == ["cancelled"]
    assert "event: cancelled" in client.get(accepted["links"]["events"]).text
