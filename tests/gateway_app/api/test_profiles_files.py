"""Profiles as YAML over HTTP: out, in, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
import yaml
from flask.testing import FlaskClient

from tasks.schema_profiles import agents, profile_versions
from tests.conftest import new_key
from tests.profile_calls import SHIPPED, activate, add, base, change, connected, create, events, read, run

SECRET_TEXT = "xyzzy-in-a-file"
FILE = f"""\
agent: poet
version: 7
description: Writes.
segments:
  - kind: role
    text: |
      You write {SECRET_TEXT}.
      Briefly.
"""


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return one kind of database: the statements are tried on both by the tests of switching and of canaries."""
    kind: str = request.param
    return kind


def send(client: FlaskClient, content: str | bytes, query: str = "", media_type: str = "application/yaml") -> Any:
    """Import a file."""
    return client.post(f"/v1/profiles/import{query}", data=content, content_type=media_type)


def test_in_and_out(client: FlaskClient) -> None:
    """A file makes a draft; the same again adds nothing; another text adds a version; what comes out goes in."""
    dry = send(client, FILE, "?dry_run=true")
    assert (dry.status_code, dry.json["action"], dry.json["version"], dry.json["dry_run"]) == (
        200,
        "created",
        None,
        True,
    )
    assert read(sa.select(agents)) == []
    made = send(client, FILE, "?author=Ada&reason=First.")
    assert (made.status_code, made.json["version"], made.json["from_version"]) == (201, 1, 7)
    entry = client.get("/v1/profiles/poet").json["versions"][0]
    assert (entry["state"], entry["author"], entry["reason"]) == ("draft", "Ada", "First.")
    assert run(client, "poet").status_code == 404
    again = send(client, FILE)
    assert (again.status_code, again.json["action"], again.json["newest_version"]) == (200, "unchanged", 1)
    changed = FILE.replace("Briefly", "At length")
    dry = send(client, changed, "?dry_run=1").json
    assert (dry["action"], dry["version"], dry["newest_version"]) == ("added", None, 1)
    assert "-Briefly.\n+At length.\n" in dry["difference"]["text"]
    assert send(client, changed).json["version"] == 2
    activate(client, "poet", 2)
    out = client.get("/v1/profiles/poet/export")
    assert out.mimetype == "application/yaml"
    assert yaml.safe_load(out.data)["version"] == 2
    assert "At length." in out.text
    old = client.get("/v1/profiles/poet/export?version=1").data
    assert yaml.safe_load(old) == yaml.safe_load(FILE) | {"version": 1}
    stranger = connected(client.application, new_key("other"))
    assert stranger.get("/v1/profiles/poet/export").status_code == 404
    assert send(stranger, out.data).json == {
        "agent": "poet", "action": "created", "dry_run": False, "from_version": 2, "newest_version": None, "version": 1,
        "difference": None,
    }  # fmt: skip
    theirs = stranger.get("/v1/profiles/poet/versions/1").json["segments"]
    assert theirs == client.get("/v1/profiles/poet").json["active"]["segments"]
    assert [event.details["action"] for event in events()] == ["activated"]


def test_every_kind_of_profile(client: FlaskClient) -> None:
    """Bases, what extends them, exchanges, and what was shipped come back the same."""
    base(client, "house", "House.")
    examples = [{"user": "a: b", "assistant": "- x\n\n  y"}]
    segments = [{"kind": "role", "text": " lead\n"}, {"kind": "few_shot", "examples": examples}]
    client.post("/v1/profiles", json={"agent": "poet", "extends": "house", "segments": segments, "activate": True})
    for agent in ("house", "poet", SHIPPED, "engineering-base"):
        content = client.get(f"/v1/profiles/{agent}/export").data
        assert send(client, content).json["action"] == "unchanged", agent
    assert client.get("/v1/profiles/poet/export").text.startswith("agent: poet\nversion: 1\nextends: house\n")
    changed = client.get(f"/v1/profiles/{SHIPPED}/export").text.replace("SEV1", "SEV-1")
    found = send(client, changed, "?dry_run=true").json
    assert (found["action"], found["newest_version"]) == ("added", 1)
    assert send(client, changed).json["version"] == 2
    change(client, "poet", "retire")
    assert client.get("/v1/profiles/poet/export").json["code"] == "not_found"
    assert client.get("/v1/profiles/poet/export?version=1").status_code == 200


def test_a_name_that_is_a_path(client: FlaskClient) -> None:
    """No agent can be named `import`; the path takes a file, and nothing else."""
    assert create(client, "import").status_code == 422
    assert send(client, FILE.replace("agent: poet", "agent: import")).status_code == 422
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        answer = client.open("/v1/profiles/import", method=method)
        assert (answer.status_code, answer.json["code"]) == (405, "method_not_allowed")
        assert "POST" in answer.headers["Allow"]
    assert client.get("/v1/profiles/imports").json["code"] == "unknown_agent"
    assert client.get("/v1/profiles/import/history").status_code == 404


REFUSED: dict[str, tuple[str | bytes, int, str]] = {
    "nothing": ("", 422, "invalid_request"),
    "a list": ("- a", 422, "invalid_request"),
    "a word": (SECRET_TEXT, 422, "invalid_request"),
    "no YAML": (f"a: [{SECRET_TEXT}", 400, "invalid_yaml"),
    "an alias": (f"a: &x {SECRET_TEXT}\nb: *x", 400, "invalid_yaml"),
    "a bomb": ("a: &a [x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(20)), 400, "invalid_yaml"),
    "a tag": (f"a: !!python/object:os.{SECRET_TEXT} x", 400, "invalid_yaml"),
    "a key twice": (FILE + f"agent: {SECRET_TEXT}\n", 400, "invalid_yaml"),
    "not UTF-8": (b"agent: \xff", 400, "invalid_yaml"),
    "a large file": (FILE + "#" * 2**20, 400, "invalid_yaml"),
    "50 MB": (b"#" * 50_000_000, 413, "body_too_large"),
    "an unknown field": (FILE + f"{SECRET_TEXT}: 1\n", 422, "invalid_request"),
    "an unknown kind": (FILE.replace("role", SECRET_TEXT), 422, "invalid_request"),
    "a number for a text": (FILE.replace("Writes.", "2024"), 422, "invalid_request"),
    "a blank text": ("agent: a\nversion: 1\nsegments: [{kind: role, text: ' '}]", 422, "invalid_request"),
    "a slash in the name": (FILE.replace("poet", "a/b"), 422, "invalid_request"),
    "too much text": (FILE.replace("Briefly", "x" * 2**18), 422, "invalid_request"),
    "a base that is not there": (FILE + "extends: nobody\n", 422, "base_unusable"),
    "itself": (FILE + "extends: poet\n", 422, "base_unusable"),
}


def test_what_is_refused(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    """Each with a stable code; nothing is stored, and nothing that was sent is repeated."""
    for name, (content, status, code) in REFUSED.items():
        for query in ("", "?dry_run=true"):
            answer = send(client, content, query)
            assert (answer.status_code, answer.json["code"]) == (status, code), (name, answer.text)
            assert answer.content_type == "application/problem+json"
            assert SECRET_TEXT not in answer.text
            assert len(answer.text) < 3000
    for media_type in ("application/json", "text/plain", ""):
        answer = send(client, FILE, media_type=media_type)
        assert (answer.status_code, "application/yaml" in answer.json["detail"]) == (415, True)
    for query in ("?dry_run=maybe", "?dry_run=true&dry_run=true", "?activate=true", "?reason=", "?author=" + "x" * 201):
        assert send(client, FILE, query).status_code == 422, query
    assert client.get(f"/v1/profiles/{SHIPPED}/export?version=0").status_code == 422
    assert client.get(f"/v1/profiles/{SHIPPED}/export?version=9").status_code == 404
    assert SECRET_TEXT not in caplog.text
    for table in (agents, profile_versions):
        assert read(sa.select(table)) == []


def test_limits_hold_for_files(client: FlaskClient) -> None:
    """Whatever comes in as a file is a draft like any other."""
    add(client, SHIPPED, "Two.")
    stale = client.get(f"/v1/profiles/{SHIPPED}/export?version=1").data
    assert send(client, stale).json["version"] == 3
