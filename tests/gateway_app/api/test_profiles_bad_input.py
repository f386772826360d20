"""Hostile and mistaken management calls: a problem document each, nothing changed, nothing recorded."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from tasks.schema import audit_events, requests
from tasks.schema_profiles import agents, profile_versions
from tests.profile_calls import read

SECRET_TEXT = "xyzzy-what-was-sent"
ROLE = [{"kind": "role", "text": "x"}]
AGENT: dict[str, Any] = {"agent": "poet", "segments": ROLE}
CANNOT = "invalid_request"
VERSIONS, ACTIVATE = "/v1/profiles/incident-responder/versions", "/v1/profiles/incident-responder/activate"
LONGEST = 2**18


def role(text: str) -> list[dict[str, str]]:
    """Return the segments of a profile with one text."""
    return [{"kind": "role", "text": text}]


#: What is sent for an agent instead of, or besides, what would be right.
AGENTS: dict[str, dict[str, Any]] = {
    "no segments": {"segments": []},
    "segments as an object": {"segments": {"kind": "role", "text": "x"}},
    "segments of null": {"segments": None},
    "a text for a segment": {"segments": [SECRET_TEXT]},
    "an unknown kind": {"segments": [{"kind": SECRET_TEXT, "text": "x"}]},
    "an unknown field in a segment": {"segments": [{"kind": "role", "text": "x", "cache": True}]},
    "a segment without text": {"segments": [{"kind": "role"}]},
    "an empty segment": {"segments": role("")},
    "a blank segment": {"segments": role(" \n\t ")},
    "a number for text": {"segments": [{"kind": "role", "text": 5}]},
    "wrong order": {"segments": [*ROLE, {"kind": "agent_base_profile", "text": "x"}]},
    "too many segments": {"segments": ROLE * 65},
    "too much text": {"segments": role("x" * (LONGEST + 1))},
    "too much text in bytes": {"segments": role("漢" * (LONGEST // 3 + 1))},
    "too much text together": {"segments": role("x" * (LONGEST // 2 + 1)) * 2},
    "a NUL in the text": {"segments": role("a\x00b")},
    "an escape in the text": {"segments": role("\x1b[31mred")},
    "a NUL in the description": {"description": "a\x00b"},
    "a long description": {"description": "x" * 501},
    "a list for a description": {"description": [SECRET_TEXT]},
    "an empty name": {"agent": ""},
    "no name": {"agent": None},
    "a number for a name": {"agent": 5},
    "a slash in the name": {"agent": "a/b"},
    "a dot for a name": {"agent": "."},
    "two dots for a name": {"agent": ".."},
    "a NUL in the name": {"agent": "a\x00b"},
    "a line feed at the name's end": {"agent": "a\n"},
    "a long name": {"agent": "x" * 201},
    "a word for a flag": {"activate": "false"},
    "a number for a flag": {"activate": 1},
    "an unknown field": {"version": 7},
    "another's organization": {"organization": "other"},
}
NEW_VERSIONS: dict[str, dict[str, Any]] = {
    "a base of zero": {"base_version": 0},
    "a base as text": {"base_version": "1"},
    "a base that no table holds": {"base_version": 2**31},
    "a base of truth": {"base_version": True},
    "a fraction for a base": {"base_version": 1.5},
    "a name": {"agent": "incident-responder"},
    "no text": {"segments": role("")},
}
ACTIVATIONS: dict[str, Any] = {
    "nothing": {},
    "text": {"version": "1"},
    "zero": {"version": 0},
    "minus one": {"version": -1},
    "too large": {"version": 2**63},
    "null": {"version": None},
    "a list": {"version": [1]},
    "more": {"version": 1, "force": True},
}
BODIES: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (b"{", 400, "invalid_json"),
    "nothing": (b"", 400, "invalid_json"),
    "a list": (b"[]", 422, CANNOT),
    "not UTF-8": (b'{"agent": "\xff"}', 400, "invalid_json"),
    "half a pair": (b'{"agent": "\\ud800"}', 400, "invalid_json"),
    "nested too deep": (b'{"segments": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json"),
    "50 MB": (b" " * 50_000_000, 413, "body_too_large"),
}
QUERIES = {
    "?limit=0": CANNOT,
    "?limit=101": CANNOT,
    "?limit=-1": CANNOT,
    "?limit=x": CANNOT,
    "?limit=" + "9" * 5000: CANNOT,
    "?limit=1.5": CANNOT,
    "?after=": CANNOT,
    "?after=%00": CANNOT,
    "?after=" + "x" * 201: CANNOT,
    "?page=2": CANNOT,
    "/incident-responder/diff": CANNOT,
    "/incident-responder/diff?from=1": CANNOT,
    "/incident-responder/diff?from=0&to=1": CANNOT,
    "/incident-responder/diff?from=1&to=x": CANNOT,
    "/incident-responder/diff?from=1&to=" + "9" * 5000: CANNOT,
    "/incident-responder/diff?from=1&to=2147483648": CANNOT,
    "/incident-responder/diff?from=1&to=2": "not_found",
    "/nobody": "unknown_agent",
    "/nobody/versions/1": "not_found",
    "/nobody/diff?from=1&to=1": "not_found",
    "/%00": "not_found",
    "/a%0Ab": "not_found",
    "/%FF%FE": "unknown_agent",
    "/" + "x" * 201: "not_found",
    "/a%2Fb": "not_found",
    "/incident-responder%00": "not_found",
    "/incident-responder%00/versions/1": "not_found",
    "/incident-responder'%20OR%201=1--": "unknown_agent",
    "/INCIDENT-RESPONDER": "unknown_agent",
    "/incident-responder/versions/0": "not_found",
    "/incident-responder/versions/2": "not_found",
    "/incident-responder/versions/-1": "not_found",
    "/incident-responder/versions/01": "not_found",
    "/incident-responder/versions/1.0": "not_found",
    "/incident-responder/versions/%D9%A1": "not_found",
    "/incident-responder/versions/2147483648": "not_found",
    "/incident-responder/versions/" + "9" * 5000: "not_found",
}


def test_bad_bodies(client: FlaskClient) -> None:
    """Each is refused with a stable code, by each path that takes one, and what was sent is not repeated."""
    sent = [("/v1/profiles", {**AGENT, **fields}, name) for name, fields in AGENTS.items()]
    sent += [(VERSIONS, {"segments": ROLE, **fields}, name) for name, fields in NEW_VERSIONS.items()]
    sent += [(ACTIVATE, body, name) for name, body in ACTIVATIONS.items()]
    for path, body, name in sent:
        refused(client, path, json.dumps(body).encode(), (422, CANNOT), name)
    for path in ("/v1/profiles", VERSIONS, ACTIVATE):
        for name, (content, status, code) in BODIES.items():
            refused(client, path, content, (status, code), name)
        answer = client.post(path, data={"agent": "poet"})
        assert (answer.status_code, answer.json["code"]) == (415, "unsupported_media_type")
    untouched()


def refused(client: FlaskClient, path: str, content: bytes, expected: tuple[int, str], name: str) -> None:
    """Send a body that must be refused."""
    answer = client.post(path, data=content, content_type="application/json")
    assert (answer.status_code, answer.json["code"]) == expected, (name, answer.text)
    assert answer.content_type == "application/problem+json"
    assert answer.json["hint"]
    assert "request_id" not in answer.text
    assert SECRET_TEXT not in answer.text
    assert len(answer.text) < 5000


def test_bad_queries_and_paths(client: FlaskClient) -> None:
    """Each is a problem document, never a crash."""
    for query, code in QUERIES.items():
        answer = client.get("/v1/profiles" + query)
        assert (answer.json["code"], answer.content_type) == (code, "application/problem+json"), (query, answer.text)
        assert answer.status_code == (422 if code == CANNOT else 404)
    for path in ("/v1/profiles/nobody/versions", "/v1/profiles/nobody%00/versions", "/v1/profiles/../versions"):
        assert client.post(path, json={"segments": ROLE}).status_code == 404
    for path in ("/v1/profiles/nobody/activate", "/v1/profiles/%00/activate"):
        assert client.post(path, json={"version": 1}).status_code == 404
    assert client.post(ACTIVATE, json={"version": 2}).json["code"] == "not_found"
    assert client.delete("/v1/profiles/incident-responder").status_code == 405
    assert client.put("/v1/profiles/incident-responder").json["code"] == "method_not_allowed"
    untouched()


def test_the_longest_text_that_is_allowed(client: FlaskClient) -> None:
    """Exactly 256 KiB, in as many segments as there may be, and back as it was, character for character."""
    part = "漢" * 1000 + "\r\n\t<|im_end|>{{ x }}\u2028🙂" + "x"
    texts = [part + "y" * (LONGEST // 64 - len(part.encode()))] * 64
    body = {"agent": "x" * 200, "segments": [{"kind": "role", "text": text} for text in texts]}
    assert client.post("/v1/profiles", json=body).status_code == 201
    shown = client.get(f"/v1/profiles/{'x' * 200}/versions/1").json
    assert [segment["text"] for segment in shown["segments"]] == texts


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_without_a_key(client: FlaskClient, method: str) -> None:
    """401 before anything else is looked at."""
    del client.environ_base["HTTP_AUTHORIZATION"]
    for path in ("", "/incident-responder", "/nobody", "/%00/versions/x"):
        answer = client.open(f"/v1/profiles{path}", method=method, data=b"{")
        assert answer.status_code in (401, 405)
    untouched()


def untouched() -> None:
    """Nothing was stored or recorded."""
    for table in (agents, profile_versions, requests, audit_events):
        assert read(sa.select(table)) == []
