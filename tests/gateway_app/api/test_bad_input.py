"""Bad requests: each gets its stable code and a hint, is recorded, and is never queued."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tasks.db import Database
from tasks.schema import audit_events, requests
from tasks.settings import settings
from tests.conftest import new_key

TASK: dict[str, Any] = {"agent": "incident-responder", "directive": "What now?"}
SECRET_TEXT = "xyzzy-what-was-sent"


def task(**changes: Any) -> bytes:
    """Return a task's JSON with some fields changed."""
    return json.dumps({**TASK, **changes}).encode()


def post(client: FlaskClient, body: bytes, content_type: str = "application/json") -> TestResponse:
    """Send a body as it is."""
    return client.post("/v1/tasks", data=body, content_type=content_type)


BAD = {
    "malformed JSON": (b'{"agent": ', 400, "invalid_json"),
    "empty body": (b"", 400, "invalid_json"),
    "invalid UTF-8": (b'{"agent": "\xff\xfe"}', 400, "invalid_json"),
    "lone surrogate": (b'{"agent": "a", "directive": "\\ud800"}', 400, "invalid_json"),
    "NaN": (b'{"agent": "a", "directive": "x", "sampling": {"temperature": NaN}}', 400, "invalid_json"),
    "Infinity in the context": (b'{"agent": "a", "directive": "x", "context": {"a": Infinity}}', 400, "invalid_json"),
    "nested too deep": (b'{"context": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json"),
    "a list": (b"[]", 422, "invalid_request"),
    "a string": (b'"x"', 422, "invalid_request"),
    "wrong type": (task(directive=5), 422, "invalid_request"),
    "text for a flag": (task(has_private_data="false"), 422, "invalid_request"),
    "unknown field": (task(**{SECRET_TEXT: 1}), 422, "invalid_request"),
    "unknown sampling field": (task(sampling={"best_of": 3}), 422, "invalid_request"),
    "no agent": (b'{"directive": "x"}', 422, "invalid_request"),
    "empty directive": (task(directive=""), 422, "invalid_request"),
    "blank directive": (task(directive=" \n\t "), 422, "invalid_request"),
    "control characters in a name": (task(project_id="a\x1b[31m"), 422, "invalid_request"),
    "control characters in the directive": (task(directive="a\x00b"), 422, "invalid_request"),
    "control characters in the context": (task(context="\x1b[31mred"), 422, "invalid_request"),
    "negative temperature": (task(sampling={"temperature": -0.1}), 422, "invalid_request"),
    "negative max_tokens": (task(sampling={"max_tokens": -1}), 422, "invalid_request"),
    "top_p of zero": (task(sampling={"top_p": 0}), 422, "invalid_request"),
    "seed too large": (task(sampling={"seed": 2**63}), 422, "invalid_request"),
    "five stop strings": (task(sampling={"stop": list("abcde")}), 422, "invalid_request"),
    "a name of 201 characters": (task(task_id="x" * 201), 422, "invalid_request"),
    "unknown agent": (task(agent="nobody"), 404, "unknown_agent"),
    "prompt too long": (task(context="word " * 20_000), 422, "prompt_too_long"),
    "answer too long": (task(sampling={"max_tokens": 5000}), 422, "prompt_too_long"),
}


def test_bad_body(client: FlaskClient) -> None:
    """The answer has the code and a hint; the record has received and failed; nothing is stored to be run."""
    for name, (body, status, code) in BAD.items():
        answer = post(client, body)
        assert (answer.status_code, answer.json["code"]) == (status, code), f"{name}: {answer.text}"
        assert answer.content_type == "application/problem+json", name
        assert answer.json["hint"], name
        assert recorded(answer.json["request_id"]) == {"received": None, "failed": code}, name
        assert count(requests) == 0, name


BAD_FIELDS = {
    "no choices": (task(sampling={"n": 0}), 422, "invalid_request"),
    "seventeen choices": (task(sampling={"n": 17}), 422, "invalid_request"),
    "too many alternatives": (task(sampling={"logprobs": 21}), 422, "invalid_request"),
    "unknown form of an answer": (task(sampling={"response_format": {"type": "xml"}}), 422, "invalid_request"),
    "unknown priority": (task(priority="urgent"), 422, "invalid_request"),
    "a number for a priority": (task(priority=1), 422, "invalid_request"),
    "metadata that is no object": (task(metadata=[["a", "b"]]), 422, "invalid_request"),
    "metadata that is no text": (task(metadata={"a": 1}), 422, "invalid_request"),
    "metadata without a name": (task(metadata={"": "a"}), 422, "invalid_request"),
    "metadata with a long name": (task(metadata={"x" * 65: "a"}), 422, "invalid_request"),
    "long metadata": (task(metadata={"a": "x" * 513}), 422, "invalid_request"),
    "much metadata": (task(metadata={str(number): "" for number in range(17)}), 422, "invalid_request"),
    "deadline without a zone": (task(deadline="2100-01-01T00:00:00"), 422, "invalid_request"),
    "deadline that is no time": (task(deadline="tomorrow"), 422, "invalid_request"),
    "deadline as a number": (task(deadline=4_102_444_800), 422, "invalid_request"),
    "deadline as a number in text": (task(deadline="4102444800"), 422, "invalid_request"),
    "deadline that is no day": (task(deadline="2100-02-30T00:00:00Z"), 422, "invalid_request"),
    "deadline after all years": (task(deadline="9999-12-31T23:59:59-01:00"), 422, "invalid_request"),
    "deadline before all years": (task(deadline="0001-01-01T00:00:00+01:00"), 422, "invalid_request"),
    "deadline that has passed": (task(deadline="2026-01-01T00:00:00Z"), 422, "deadline_passed"),
    "messages, as chat has them": (task(messages=[{"role": "user", "content": "x"}]), 422, "invalid_request"),
}


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_bad_fields(client: FlaskClient) -> None:
    """The same for what a task may say of itself."""
    for name, (body, status, code) in BAD_FIELDS.items():
        answer = post(client, body)
        assert (answer.status_code, answer.json["code"]) == (status, code), f"{name}: {answer.text}"
        assert answer.json["hint"], name
        assert recorded(answer.json["request_id"]) == {"received": None, "failed": code}, name
    assert count(requests) == 0


def test_huge_body(client: FlaskClient) -> None:
    """50 MB are refused without being read into memory."""
    answer = post(client, b" " * 50_000_000)
    assert (answer.status_code, answer.json["code"]) == (413, "body_too_large")
    assert recorded(answer.json["request_id"]) == {"received": None, "failed": "body_too_large"}


def test_the_farthest_deadline(client: FlaskClient) -> None:
    """What can be written down can be stored, and comes back as the same instant."""
    for deadline, shown in (
        ("9999-12-31T23:59:59Z", "9999-12-31T23:59:59+00:00"),
        ("2100-01-01T01:00:00+01:00", "2100-01-01T00:00:00+00:00"),
    ):
        accepted: dict[str, Any] = post(client, task(deadline=deadline)).get_json()
        assert client.get(accepted["links"]["self"]).json["deadline"] == shown


def test_other_content_type(client: FlaskClient) -> None:
    """A form is not guessed at."""
    answer = post(client, task(), "application/x-www-form-urlencoded")
    assert (answer.status_code, answer.json["code"]) == (415, "unsupported_media_type")


def test_what_was_sent_is_not_repeated(client: FlaskClient) -> None:
    """An error names fields, not values: it may be logged by whoever gets it."""
    answer = post(client, task(directive=[SECRET_TEXT], context=5, sampling={"stop": [SECRET_TEXT * 20]}))
    assert SECRET_TEXT not in answer.text
    assert {problem["field"] for problem in answer.json["errors"]} >= {"directive", "sampling.stop.0"}


def test_missing_or_wrong_key(client: FlaskClient) -> None:
    """401, with nothing recorded: else the record itself could be flooded by strangers."""
    del client.environ_base["HTTP_AUTHORIZATION"]
    for header in (None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic abc", "Bearer " + "x" * 5000):
        answer = client.post("/v1/tasks", json=TASK, headers={"Authorization": header} if header is not None else {})
        assert (answer.status_code, answer.json["code"]) == (401, "unauthenticated"), header
        assert answer.headers["WWW-Authenticate"].startswith("Bearer"), header
        assert count(audit_events) == 0, header


def test_foreign_and_unknown_ids_are_alike(client: FlaskClient) -> None:
    """Another organization's task is not found, and the answer is the same as for an id that never was."""
    accepted = client.post("/v1/tasks", json=TASK)
    assert accepted.status_code == 202, accepted.text
    stranger = {"Authorization": f"Bearer {new_key('other')}"}
    paths = [accepted.json["id"], "gw_" + "0" * 12 + "7" + "0" * 3 + "8" + "0" * 15, "nonsense", "gw_%00"]
    for tail in ("", "/events"):
        answers = [client.get(f"/v1/tasks/{path}{tail}", headers=stranger) for path in paths]
        assert {answer.status_code for answer in answers} == {404}
        assert len({answer.text for answer in answers}) == 1


def test_wrong_cursor(client: FlaskClient) -> None:
    """A cursor that is none, or of an attempt that has not begun."""
    task_id = client.post("/v1/tasks", json=TASK).json["id"]
    for cursor in ("x", "1", "-1-1", "1-1-1", "1-", "9" * 30 + "-1", "1_0-1", "١-١", "5-1"):
        answer = client.get(f"/v1/tasks/{task_id}/events", query_string={"cursor": cursor})
        assert (answer.status_code, answer.json["code"]) == (400, "invalid_cursor"), cursor


def test_unknown_path_and_method(client: FlaskClient) -> None:
    """Also these are problem documents."""
    assert client.get("/v2/nothing").json["code"] == "not_found"
    answer = client.put("/v1/tasks")
    assert (answer.status_code, answer.json["code"]) == (405, "method_not_allowed")
    assert "POST" in answer.headers["Allow"]


def recorded(request_id: str) -> dict[str, str | None]:
    """Return the codes of a request's events, by kind."""
    query = sa.select(audit_events.c.kind, audit_events.c.code).where(audit_events.c.request_id == request_id)
    return {row.kind: row.code for row in read(query)}


def count(table: sa.Table) -> int:
    """Return how many rows a table has."""
    return int(read(sa.select(sa.func.count()).select_from(table))[0][0])


def read(query: sa.Select[Any]) -> list[sa.Row[Any]]:
    """Run a query on the gateway's database."""
    database = Database(settings().database)
    try:
        return database.read(lambda connection: list(connection.execute(query)))
    finally:
        database.close()
