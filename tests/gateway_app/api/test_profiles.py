"""The life of agents over HTTP: made, changed, tried, made active, compared."""

from __future__ import annotations

import difflib

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app import build
from tasks.schema_profiles import agents
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.profile_calls import SHIPPED, activate, add, connected, create, read, recorded, run, segments

#: The tiny model's context window is too small for this one.
SHIPPED_TOO_LARGE = "contract-validator"


def test_whole_life(client: FlaskClient) -> None:
    """From nothing to an active version, a second one, and back."""
    made = create(client, "poet", description="Writes.")
    assert made.status_code == 201, made.text
    assert made.headers["Location"] == "/v1/profiles/poet"
    assert (made.json["active_version"], made.json["newest_version"], made.json["version_count"]) == (None, 1, 1)
    assert made.json["active"] is None
    refused = run(client, "poet")
    assert (refused.status_code, refused.json["code"]) == (404, "unknown_agent")
    assert "poet" not in refused.json["agents"]
    assert SHIPPED in refused.json["agents"]

    active = activate(client, "poet", 1)
    assert active.status_code == 200, active.text
    assert (active.json["active_version"], active.json["previous_version"], active.json["joinable"]) == (1, None, True)
    assert 0 < active.json["static_token_count"] < active.json["least_prompt_tokens"] < active.json["context_window"]
    assert recorded(run(client, "poet").json["id"]) == (1, active.json["static_profile_hash"])

    second = add(client, "poet", "Two.", description="Writes more.")
    assert (second.status_code, second.json["version"], second.json["static_profile_hash"]) == (201, 2, None)
    assert second.headers["Location"] == "/v1/profiles/poet/versions/2"
    assert recorded(run(client, "poet").json["id"])[0] == 1
    assert activate(client, "poet", 2).json["previous_version"] == 1
    version, static_profile_hash = recorded(run(client, "poet").json["id"])
    assert (version, static_profile_hash != active.json["static_profile_hash"]) == (2, True)

    shown = client.get("/v1/profiles/poet").json
    assert [entry["version"] for entry in shown["versions"]] == [2, 1]
    assert shown["active"]["segments"] == segments("Two.")
    assert (shown["source"], shown["description"], shown["active_version"]) == ("api", "Writes more.", 2)
    assert shown["activated_at"] >= shown["versions"][0]["created_at"]
    assert shown["versions"][0]["created_by"].startswith("key_")
    assert client.get("/v1/profiles/poet/versions/1").json["segments"] == segments("One.")
    assert activate(client, "poet", 1).json["static_profile_hash"] == active.json["static_profile_hash"]
    assert recorded(run(client, "poet").json["id"])[0] == 1


def test_active_from_the_start(client: FlaskClient) -> None:
    """`activate` makes and activates in one step, also a version."""
    made = create(client, "poet", activate=True)
    assert (made.status_code, made.json["active_version"]) == (201, 1)
    assert made.json["static_token_count"] > 0
    added = add(client, "poet", "Two.", activate=True)
    assert added.status_code == 201
    assert recorded(run(client, "poet").json["id"]) == (2, added.json["static_profile_hash"])


def test_shipped_agents_can_be_changed_and_had_back(client: FlaskClient) -> None:
    """Own versions go on top of the file's; activating the file's number goes back to the file."""
    taken = create(client, SHIPPED)
    assert (taken.status_code, taken.json["code"], "versions" in taken.json["hint"]) == (409, "profile_exists", True)
    shipped = client.get(f"/v1/profiles/{SHIPPED}").json
    assert (shipped["source"], shipped["active_version"], shipped["version_count"]) == ("file", 1, 1)
    assert add(client, SHIPPED, "Ours.").json["version"] == 2
    assert client.get(f"/v1/profiles/{SHIPPED}").json["source"] == "file"
    assert activate(client, SHIPPED, 2).json["previous_version"] == 1
    changed = client.get(f"/v1/profiles/{SHIPPED}").json
    assert (changed["source"], changed["active_version"], changed["version_count"]) == ("api", 2, 2)
    assert [(entry["version"], entry["source"]) for entry in changed["versions"]] == [(2, "api"), (1, "file")]
    assert recorded(run(client, SHIPPED).json["id"])[0] == 2
    assert activate(client, SHIPPED, 1).json["previous_version"] == 2
    back = client.get(f"/v1/profiles/{SHIPPED}").json
    for name in ("source", "active_version", "static_profile_hash", "static_token_count", "active"):
        assert back[name] == shipped[name]
    assert recorded(run(client, SHIPPED).json["id"]) == (1, shipped["static_profile_hash"])


def test_lists_are_paged(client: FlaskClient) -> None:
    """Every agent once, in order of code points, whatever the page's size; shipped and own ones together."""
    names = ["Zebra", "ant", "ähnlich", "zoo", "漢字", "a b", "%20", "x;y=1"]
    for name in names:
        assert create(client, name).status_code == 201
    expected = sorted([*names, SHIPPED, SHIPPED_TOO_LARGE, "migration-planner", "engineering-base"])
    for limit in (1, 3, 100):
        found: list[str] = []
        while True:
            query = {"limit": limit, **({"after": found[-1]} if found else {})}
            page = client.get("/v1/profiles", query_string=query).json
            assert len(page["data"]) <= limit
            found += [item["agent"] for item in page["data"]]
            if not page["has_more"]:
                break
        assert found == expected
    for name in names:
        path = create(client, name + "!").headers["Location"]
        assert client.get(path).json["agent"] == name + "!"


def test_the_list_shows_what_is_active(client: FlaskClient) -> None:
    """Also of agents with a version of their own."""
    create(client, "poet", activate=True)
    static_profile_hash = add(client, "poet", "Two.", activate=True).json["static_profile_hash"]
    add(client, "poet", "Three.")
    shown = {item["agent"]: item for item in client.get("/v1/profiles").json["data"]}
    assert shown[SHIPPED]["source"] == "file"
    assert shown["poet"].items() >= {
        "source": "api", "active_version": 2, "newest_version": 3, "version_count": 3,
        "static_profile_hash": static_profile_hash,
    }.items()  # fmt: skip


def test_what_does_not_fit_is_not_activated(client: FlaskClient) -> None:
    """A version that leaves no room in the context window can be stored, and not made active; nothing is changed."""
    words = "word " * 1900
    for fields in ({"activate": True}, {}):
        made = create(client, "poet", words, **fields)
        assert made.status_code == (422 if fields else 201)
    assert made.json["active_version"] is None
    refused = activate(client, "poet", 1)
    assert (refused.status_code, refused.json["code"], refused.json["context_window"]) == (
        422,
        "profile_unusable",
        2048,
    )
    assert add(client, "poet", "fits", activate=True).json["version"] == 2
    assert add(client, "poet", "word " * 50_000, activate=True).json["code"] == "profile_unusable"
    assert activate(client, "poet", 1).status_code == 422
    assert recorded(run(client, "poet").json["id"])[0] == 2
    assert client.get("/v1/profiles/poet").json["newest_version"] == 2
    assert activate(client, SHIPPED_TOO_LARGE, 1).json["code"] == "profile_unusable"


def test_edits_that_cross(client: FlaskClient) -> None:
    """Who says which state theirs builds on is told when it has changed: by number, or by entity tag."""
    tag = create(client, "poet").headers["ETag"]
    assert add(client, "poet", "Two.", base_version=1).status_code == 201
    stale = add(client, "poet", "Three.", base_version=1)
    assert (stale.status_code, stale.json["code"], stale.json["newest_version"]) == (409, "version_conflict", 2)
    assert add(client, "poet", "Three.", {"If-Match": tag}).json["code"] == "version_conflict"
    tag = client.get("/v1/profiles/poet").headers["ETag"]
    activate(client, "poet", 2)
    assert add(client, "poet", "Three.", {"If-Match": tag}).status_code == 409
    assert add(client, "poet", "Three.", {"If-Match": "nonsense"}).status_code == 409
    tag = client.get("/v1/profiles/poet").headers["ETag"]
    assert add(client, "poet", "Three.", {"If-Match": f'"0.0", W/{tag}'}).json["version"] == 3
    assert add(client, "poet", "Four.", {"If-Match": "*"}).json["version"] == 4
    assert add(client, SHIPPED, "Two.", base_version=2).json["newest_version"] == 1
    assert add(client, SHIPPED, "Two.", base_version=1).json["version"] == 2


def test_another_model_is_served(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash and count are those of the served model; until the first use with it they are not known."""
    before = create(client, "poet", activate=True).json["static_profile_hash"]
    monkeypatch.setenv(f"{PREFIX}ENGINE__SERVED_MODEL_NAME", "another")
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        other = connected(app, new_key("default"))
        shown = other.get("/v1/profiles/poet").json
        assert (shown["active_version"], shown["static_profile_hash"], shown["static_token_count"]) == (1, None, None)
        hashed = recorded(run(other, "poet").json["id"])[1]
        assert other.get("/v1/profiles/poet").json["static_profile_hash"] == hashed != before


def test_differences(client: FlaskClient) -> None:
    """As text that `diff` could have written, and segment by segment."""
    old, new = "a\nb\nc\nd\ne\nf\ng\nh\n", "a\nb\nc\nd\nE\nf\ng\nh\ni\n"
    create(client, "poet", old)
    body = {"segments": [*segments("New.", new), {"kind": "tools", "text": "t"}], "description": "More."}
    client.post("/v1/profiles/poet/versions", json=body)
    shown = client.get("/v1/profiles/poet/diff?from=1&to=2").json
    assert (shown["agent"], shown["from"], shown["to"]) == ("poet", 1, 2)
    assert (shown["shared_segments"], shown["description_changed"]) == (1, True)
    found = [
        (change["kind"], change["change"], change["old_index"], change["new_index"]) for change in shown["changes"]
    ]
    assert sorted(found) == [("role", "added", None, 2), ("role", "changed", 1, 1), ("tools", "added", None, 3)]
    same = client.get("/v1/profiles/poet/diff?from=2&to=2").json
    assert (same["changes"], same["text"], same["shared_segments"]) == ([], "", 4)
    client.post("/v1/profiles/poet/versions", json={"segments": segments(new)})
    change = client.get("/v1/profiles/poet/diff?from=1&to=3").json["changes"][0]
    lines = (old.splitlines(keepends=True), new.splitlines(keepends=True))
    assert change["diff"] == "".join(difflib.unified_diff(*lines, "role 1", "role 1"))
    assert (change["lines_added"], change["lines_removed"]) == (2, 1)


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch, configured: None) -> None:
    """Allow an organization two agents of two versions each, and a version two segments of 20 bytes together."""
    monkeypatch.setenv(f"{PREFIX}PROFILES__MAX_SEGMENTS", "2")
    monkeypatch.setenv(f"{PREFIX}PROFILES__MAX_TEXT_BYTES", "20")
    monkeypatch.setenv(f"{PREFIX}PROFILES__MAX_AGENTS", "2")
    monkeypatch.setenv(f"{PREFIX}PROFILES__MAX_VERSIONS", "2")
    settings.cache_clear()


def test_limits(limited: None, client: FlaskClient) -> None:
    """So many agents, versions, segments and bytes, and no more."""
    for roles, told in ((("x", "y"), "3 segments; at most 2"), (("é" * 8,), "21 bytes of text; at most 20")):
        refused = create(client, "a", *roles)
        assert (refused.status_code, refused.json["code"]) == (422, "invalid_request")
        assert told in refused.json["errors"][0]["message"]
    assert [create(client, name).status_code for name in "abc"] == [201, 201, 409]
    assert add(client, SHIPPED, "Two.").json["code"] == "profile_limit"
    assert [add(client, "a", "x").status_code for _ in range(3)] == [201, 409, 409]
    assert add(client, "a", "x").json["limit"] == 2
    assert [row.agent_name for row in read(sa.select(agents).order_by(agents.c.agent_name))] == ["a", "b"]
    assert create(connected(client.application, new_key("other")), "c").status_code == 201
