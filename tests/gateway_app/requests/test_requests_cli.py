"""`flask requests`: what an operator sees of requests, and how a dead one is sent again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from flask.cli import cli
from flask.testing import FlaskClient

from tasks import lifecycle
from tasks.db import Database, now
from tasks.schema import api_keys, audit_events
from tasks.settings import settings
from tests.services import wait_until

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
TASK = {"agent": "incident-responder", "directive": "A secret question", "metadata": {"note": "mine"}}
UNKNOWN = "gw_01a2157d6fe3728093e81c93e0fd9342"


def flask(*arguments: str) -> Result:
    """Run a command as `flask` does, without .flaskenv: no command here needs the application."""
    runner = CliRunner(env={"FLASK_RUN_FROM_CLI": "true", "FLASK_SKIP_DOTENV": "1"})
    return runner.invoke(cli, ("requests", *arguments), prog_name="flask")


def made(*arguments: str) -> str:
    """Run a command that must succeed; return what it printed."""
    result = flask(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def database(client: FlaskClient) -> Iterator[Database]:
    """Return the gateway's database."""
    del client
    with closing(Database(settings().database)) as database:
        yield database


def submit(client: FlaskClient, key: str | None = None, **task: Any) -> str:
    """Submit a task; return its id."""
    headers = {"Idempotency-Key": key} if key else {}
    answer = client.post("/v1/tasks", json=TASK | task, headers=headers)
    assert answer.status_code == 202, answer.text
    request_id: str = answer.get_json()["id"]
    return request_id


def die(database: Database, request_id: str) -> None:
    """Let a request use up its attempts."""

    def attempt(on: sa.Connection) -> str:
        begun = lifecycle.start(on, request_id, 1, "gpu@test", 3)
        assert isinstance(begun, lifecycle.Attempt)
        return lifecycle.give_back(on, begun, "engine_failed", max_attempts=3)

    assert [database.write(attempt) for _ in range(3)] == ["queued", "queued", "dead"]


def test_listing(client: FlaskClient, database: Database) -> None:
    """By state and organization, the newest first; only what is asked for, and never what was asked of the model."""
    first, dead, last = (submit(client) for _ in range(3))
    die(database, dead)
    assert [line.split()[0] for line in made("list").splitlines()] == [last, dead, first]
    assert [line.split()[0] for line in made("list", "--limit", "1").splitlines()] == [last]
    assert [line.split()[0] for line in made("list", "--state", "queued").splitlines()] == [last, first]
    [line] = made("list", "--state", "dead", "--organization", "default").splitlines()
    assert (line.split()[0], "attempts_exhausted" in line) == (dead, True)
    assert made("list", "--organization", "other") == ""
    assert made("list", "--state", "failed") == ""
    [row] = json.loads(made("list", "--state", "dead", "--json"))
    assert (row["request_id"], row["state"], row["attempt"]) == (dead, "dead", 3)
    assert "secret" not in made("list", "--json")


@SQLITE
def test_showing(client: FlaskClient, database: Database) -> None:
    """A request's columns and all its events in order, without its text."""
    request_id = submit(client)
    die(database, request_id)
    shown = made("show", request_id)
    assert "state          dead" in shown
    kinds = [*["received", "admitted"], *["started", "requeued"] * 2, "started", "dead"]
    events = [line for line in shown.splitlines() if line.startswith("20")]
    assert [line.split()[1] for line in events] == kinds
    assert "code engine_failed" in events[3]
    as_json = json.loads(made("show", request_id, "--json"))
    assert [event["kind"] for event in as_json["events"]] == kinds
    assert as_json["error_code"] == "attempts_exhausted"
    assert "secret" not in shown + json.dumps(as_json)


def test_a_dead_request_is_sent_again(client: FlaskClient, database: Database) -> None:
    """As a new one, with the same content, for the same caller, named in the record; the old one stays as it is."""
    dead = submit(client, "my key", sampling={"seed": 7})
    die(database, dead)
    again = made("retry", dead).strip()
    assert again != dead
    before, after = (client.get(f"/v1/tasks/{request_id}").get_json() for request_id in (dead, again))
    assert (before["status"], after["status"]) == ("dead", "queued")
    assert after["metadata"] == TASK["metadata"]
    details = sa.select(audit_events.c.details).where(
        audit_events.c.request_id == again, audit_events.c.kind == "admitted"
    )
    assert database.read(lambda on: on.execute(details).scalar_one())["retry_of"] == dead
    assert f"retry_of {dead}" in made("show", again)
    repeated = client.post(
        "/v1/tasks", json=TASK | {"sampling": {"seed": 7}}, headers={"Idempotency-Key": "my key"}
    ).get_json()
    assert repeated["id"] == again, "the client's key stands for the new one"
    twice = flask("retry", dead)
    assert (twice.exit_code, twice.stdout.strip()) == (0, again)
    assert "already sent again" in twice.stderr
    assert len(made("list").splitlines()) == 2


@SQLITE
def test_a_deadline_that_has_passed_is_left_out(client: FlaskClient, database: Database) -> None:
    """One that has not passed is kept."""
    soon, later = now() + timedelta(seconds=1), now() + timedelta(hours=1)
    ids = [submit(client, deadline=deadline.isoformat()) for deadline in (soon, later)]
    for request_id in ids:
        die(database, request_id)
    wait_until(lambda: now() > soon, 10, "the first deadline")
    again = [made("retry", request_id).strip() for request_id in ids]
    assert [client.get(f"/v1/tasks/{request_id}").get_json()["deadline"] for request_id in again] == [
        None,
        later.isoformat(),
    ]


@SQLITE
def test_what_cannot_be_sent_again(client: FlaskClient, database: Database) -> None:
    """An unknown id, one that is not dead, one whose key was revoked, one that the policy forbids by now."""
    waiting, dead = submit(client), submit(client, directive="Ask jane.doe@example.org")
    die(database, dead)
    for command in ("show", "retry"):
        unknown = flask(command, UNKNOWN)
        assert (unknown.exit_code, f"no request has the id {UNKNOWN}" in unknown.stderr) == (1, True)
    refused = flask("retry", waiting)
    assert (refused.exit_code, "only a dead request" in refused.stderr) == (1, True)
    set_policy = ("policy", "set", "--policy", "default", "--detection", "refuse")
    assert CliRunner(env={"FLASK_SKIP_DOTENV": "1"}).invoke(cli, set_policy).exit_code == 0
    vetoed = flask("retry", dead)
    assert (vetoed.exit_code, "this organization refuses" in vetoed.stderr) == (1, True), vetoed.stderr
    database.write(lambda on: on.execute(sa.update(api_keys).values(revoked_at=now())) and None)
    revoked = flask("retry", dead)
    assert (revoked.exit_code, "was revoked" in revoked.stderr) == (1, True)
    assert len(made("list").splitlines()) == 2


@pytest.mark.parametrize("command", ["list", "show", "retry"])
def test_help(command: str) -> None:
    """Each command explains itself."""
    assert "Usage: flask requests" in made(command, "--help")
