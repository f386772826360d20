"""Why a request ran where it did, as an operator and as its organization are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from click.testing import CliRunner, Result
from flask.cli import cli
from flask.testing import FlaskClient

from gateway_app.requests.explain import attempts
from tasks import lifecycle, requests_read
from tasks.db import Database
from tasks.job import Result as Answer
from tasks.job import Timings, Usage
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.services import free_port

AT = 1764148000.0
FOREIGN = "cd" * 32
TASK = {"agent": "incident-responder", "directive": "A secret question"}


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return which it is: databases make no difference here but for what the schema's own tests look at."""
    kind: str = request.param
    return kind


@pytest.fixture
def database(client: FlaskClient) -> Iterator[Database]:
    """Return the gateway's database."""
    del client
    with closing(Database(settings().database)) as database:
        yield database


def flask(*arguments: str) -> Result:
    """Run `flask requests explain`; no command here needs the application."""
    runner = CliRunner(env={"FLASK_RUN_FROM_CLI": "true", "FLASK_SKIP_DOTENV": "1"})
    return runner.invoke(cli, ("requests", "explain", *arguments), prog_name="flask")


def made(*arguments: str) -> str:
    """Run it; it must succeed. Return what it printed."""
    result = flask(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def candidate(profile: str, turn: float, **facts: Any) -> dict[str, Any]:
    """Return a list that waits, whose turn came so many seconds before the decision."""
    usual = {"waiting": 1, "waited": 0, "cached": 0, "static": 6000, "seconds": 0.24, "copies": 0, "eligible_at": 0}
    whole = {"profile": profile, "turn": AT - turn, **usual, **facts}
    return {"price": whole["turn"] + 32 * whole["seconds"], **whole}


def schedule(*candidates: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Return the details of a `started` event."""
    told = {
        "strategy": "cache_aware_continuous", "worker": "gpu@a", "at": AT, "batch": 2, "chosen": 0, "candidates": candidates,
        "worker_facts": {
            "room": 3, "budget": 8192, "in_flight": 777_777_777, "load": 888_888_888, "free_tokens": 999_999_999, "prefill_rate": 25000,
            "affinity": 32, "patience": 4, "is_least_loaded": False, "is_next": True,
        },
    }  # fmt: skip
    return {"schedule": told | facts}


def submit(client: FlaskClient) -> tuple[str, str]:
    """Submit a task; return its id, and the hash of its profile."""
    accepted = client.post("/v1/tasks", json=TASK).get_json()
    with closing(Database(settings().database)) as database:
        row = requests_read.found(database, accepted["id"], "default")
    assert row is not None
    return str(row.request_id), str(row.static_profile_hash)


def run(database: Database, request_id: str, details: dict[str, Any] | None, *, cached: int | None = None) -> None:
    """Let a worker begin an attempt, and answer with so many cached tokens, if any."""
    begun = database.write(lambda on: lifecycle.start(on, request_id, 1, "gpu@a", 3, None, details))
    assert isinstance(begun, lifecycle.Attempt)
    if cached is not None:
        usage = Usage(prompt_tokens=6050, cached_tokens=cached, output_tokens=1)
        timings = Timings(queued_ms=1, total_ms=2)
        answer = Answer(pieces=(), finish_reasons=("stop",), model="tiny", usage=usage, timings=timings)
        assert database.write(lambda on: lifecycle.answer(on, begun, answer, b"sealed"))


def test_in_words(client: FlaskClient, database: Database) -> None:
    """Each candidate is a line with its agent's name, and what was expected stands beside what was found."""
    request_id, profile = submit(client)
    winner = candidate(profile, 0.5, cached=6000, seconds=0.0)
    others = (
        candidate(f"{profile}:low", 0.25),
        candidate(FOREIGN, 9.0, copies=2, waiting=4, waited=0.1, eligible_at=AT + 0.75),
        candidate("ef" * 32, 8.0, filling=AT + 1, eligible_at=AT + 1),
    )
    run(database, request_id, schedule(winner, *others), cached=5984)
    shown = made(request_id)
    chosen, low, left, filling = [line for line in shown.splitlines() if line.endswith(("now", "0.75 s", "1.00 s"))]
    assert chosen.split()[:3] == ["*", "incident-responder", "v1"]
    assert "6000/6000" in chosen
    assert "-0.500 s" in chosen
    assert "incident-responder v1, low" in low
    assert "+7.430 s" in low
    assert left.split()[:3] == [FOREIGN[:12], "4", "0.10"]
    assert filling.split()[0] == "efefefefefef"
    for sentence in (
        "attempt 1 began on gpu@a at ",
        "strategy cache_aware_continuous; the worker took a batch of 2",
        "It had the lowest price of 2 that might go: its turn had come 0.50 s before.",
        "Its profile is in this worker's KV cache",
        f"{FOREIGN[:12]} is left to the 2 others that hold it: what waits has waited 0.10 s together",
        "efefefefefef is being computed by this worker",
        "6000 of the profile's 6000 tokens were expected in the KV cache; 5984 of the prompt's 6050 were found.",
    ):
        assert sentence in shown
    assert "secret" not in shown


def test_other_strategies(client: FlaskClient, database: Database) -> None:
    """The same moment, as they see it: run by the queue's own files."""
    request_id, profile = submit(client)
    older = candidate(FOREIGN, 9.0, copies=2, waiting=1, waited=0.1, eligible_at=AT + 3)
    run(database, request_id, schedule(candidate(profile, 0.5, cached=6000, seconds=0.0), older))
    assert "Under cache_aware_continuous the same would have been chosen." in made(
        request_id, "--replay", "cache_aware_continuous"
    )
    assert f"Under fifo {FOREIGN[:12]} would have been chosen." in made(request_id, "--replay", "fifo")
    assert "Under least_loaded none of these would have gone" in made(request_id, "--replay", "least_loaded")
    [attempt] = json.loads(made(request_id, "--json", "--replay", "fifo"))["attempts"]
    assert attempt["replay"] == {
        "strategy": "fifo", "prices": [AT - 0.5, AT - 9.0], "eligible_at": [0, 0], "chosen": 1
    }  # fmt: skip
    assert flask(request_id, "--replay", "best").exit_code == 2


def test_as_json(client: FlaskClient, database: Database) -> None:
    """All that was recorded, with names."""
    request_id, profile = submit(client)
    details = schedule(candidate(profile, 0.5))
    run(database, request_id, details)
    document = json.loads(made(request_id, "--json"))
    assert (document["request_id"], document["state"]) == (request_id, "running")
    [attempt] = document["attempts"]
    assert (attempt["worker"], attempt["expected_tokens"], attempt["cached_tokens"]) == ("gpu@a", 0, None)
    [only] = attempt["schedule"].pop("candidates")
    assert only["name"] == "incident-responder v1"
    assert attempt["schedule"]["worker_facts"]["in_flight"] == 777_777_777
    assert {name: only[name] for name in details["schedule"]["candidates"][0]} == details["schedule"]["candidates"][0]


def test_each_attempt_has_its_own(client: FlaskClient, database: Database) -> None:
    """One that an earlier release began, or whose decision could not be read, has none."""
    request_id, profile = submit(client)
    assert made(request_id).splitlines() == [f"{request_id} is queued"]
    run(database, request_id, None)
    run(database, request_id, {"schedule": {"strategy": "fifo"}})
    run(database, request_id, schedule(candidate(profile, 0.5, seconds=1.0), strategy="fifo"), cached=0)
    shown = made(request_id, "--replay", "round_robin")
    assert shown.count("no decision is recorded for it") == 2
    assert "attempt 3 began on gpu@a" in shown
    assert "It came first: its turn had come 0.50 s before." in shown
    assert "0 of the prompt's 6050 were found" in shown
    found = attempts(database, request_id, "default")
    assert [(one.number, one.decision is not None, one.cached_tokens) for one in found] == [
        (1, False, None), (2, False, None), (3, True, 0)
    ]  # fmt: skip


def test_what_cannot_be_explained(client: FlaskClient, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown id, and another strategy without the Redis in which strategies run."""
    assert "no request has the id gw_x" in flask("gw_x").output
    request_id, profile = submit(client)
    run(database, request_id, schedule(candidate(profile, 0.5)))
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    monkeypatch.setenv(f"{PREFIX}GATEWAY__REDIS_TIMEOUT_S", "1")
    settings.cache_clear()
    assert "Nothing else might go" in made(request_id)
    assert "gave no answer: ConnectionError" in flask(request_id, "--replay", "fifo").output


def test_over_http(client: FlaskClient, database: Database) -> None:
    """A request's organization is told the same, but nothing of what the worker did for others; no other is told."""
    request_id, profile = submit(client)
    path = f"/v1/tasks/{request_id}/schedule"
    assert client.get(path).get_json() == {"data": []}
    later = candidate(FOREIGN, 9.0, copies=2, waiting=4, waited=0.1, eligible_at=AT + 0.75)
    run(database, request_id, schedule(candidate(profile, 0.5, cached=6000, seconds=0.0), later), cached=5984)
    answer = client.get(path)
    [attempt] = answer.get_json()["data"]
    assert (attempt["expected_tokens"], attempt["cached_tokens"], attempt["prompt_tokens"]) == (6000, 5984, 6050)
    assert [(one["name"], one["price_s"], one["eligible_in_s"]) for one in attempt["candidates"]] == [
        ("incident-responder v1", -0.5, 0.0), (FOREIGN[:12], -1.32, 0.75)
    ]  # fmt: skip
    record = client.get("/v1/audit/events", query_string={"request_id": request_id}).text
    assert profile in record
    for text in (answer.text, record):
        assert not [
            secret for secret in ("worker_facts", "in_flight", "777777777", "888888888", "999999999") if secret in text
        ]
    assert client.get("/v1/tasks/gw_01a2157d6fe3728093e81c93e0fd9342/schedule").status_code == 404
    other = {"Authorization": f"Bearer {new_key('other')}"}
    assert client.get(path, headers=other).status_code == 404
