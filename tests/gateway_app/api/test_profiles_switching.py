"""Which version requests get: activated, rolled back, retired; by whom, why, and how the record tells."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask.testing import FlaskClient

from gateway_app import build
from gateway_app.governance.api_keys import ApiKeys
from tasks.db import Database
from tasks.ids import new_request_id
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.profile_calls import SHIPPED, activate, add, change, connected, create, events, recorded, run

WHY: dict[str, Any] = {"author": "Ada", "reason": "Answers were too long."}


def states(client: FlaskClient, agent: str) -> list[tuple[int, str]]:
    """Return the agent's versions with their states."""
    return [(entry["version"], entry["state"]) for entry in client.get(f"/v1/profiles/{agent}").json["versions"]]


def test_states(client: FlaskClient) -> None:
    """A draft becomes active, retires the one before, and can become active again."""
    create(client, "poet", **WHY)
    assert states(client, "poet") == [(1, "draft")]
    entry = client.get("/v1/profiles/poet").json["versions"][0]
    assert (entry["author"], entry["reason"], entry["activated_at"]) == (*WHY.values(), None)
    activate(client, "poet", 1)
    add(client, "poet", "Two.")
    assert states(client, "poet") == [(2, "draft"), (1, "active")]
    activate(client, "poet", 2)
    assert states(client, "poet") == [(2, "active"), (1, "retired")]
    add(client, "poet", "Three.", activate=True)
    assert states(client, "poet") == [(3, "active"), (2, "retired"), (1, "retired")]
    assert states(client, SHIPPED) == [(1, "active")]
    add(client, SHIPPED, "Two.", activate=True)
    assert states(client, SHIPPED) == [(2, "active"), (1, "retired")]


def test_rollback(client: FlaskClient) -> None:
    """One call goes back to what was active before, with the same hash; another one leads forth again."""
    assert change(client, "poet", "rollback").json["code"] == "unknown_agent"
    first = create(client, "poet", activate=True).json["static_profile_hash"]
    nothing = change(client, "poet", "rollback")
    assert (nothing.status_code, nothing.json["code"]) == (404, "not_found")
    add(client, "poet", "Two.", activate=True)
    add(client, "poet", "Three.", activate=True)
    assert client.get("/v1/profiles/poet").json["previous_version"] == 2
    back = change(client, "poet", "rollback", **WHY).json
    assert (back["active_version"], back["previous_version"]) == (2, 3)
    assert recorded(run(client, "poet").json["id"])[0] == 2
    assert change(client, "poet", "rollback").json["active_version"] == 3
    assert change(client, "poet", "rollback", version=1).json["static_profile_hash"] == first
    assert activate(client, "poet", 1).json["previous_version"] == 1
    assert change(client, "poet", "rollback").json["active_version"] == 3
    add(client, "poet", "Never active.")
    refused = change(client, "poet", "rollback", version=4)
    assert (refused.status_code, "activate" in refused.json["detail"]) == (404, True)
    assert change(client, "poet", "rollback", version=9).status_code == 404


def test_a_body_may_be_left_out(client: FlaskClient) -> None:
    """Where all of it is optional, no body is an empty one; a body that is no JSON is refused all the same."""
    create(client, "poet", activate=True)
    add(client, "poet", "Two.", activate=True)
    for content, media_type, status in ((b"", "text/plain", 415), (b"{}", "", 415), (b"", "application/json", 400)):
        answer = client.post("/v1/profiles/poet/rollback", data=content, content_type=media_type)
        assert answer.status_code == status, (content, media_type, answer.text)
    assert client.post("/v1/profiles/poet/rollback").json["active_version"] == 1
    canary = client.put("/v1/profiles/poet/canary", json={"version": 2, "share": 0.5})
    assert canary.status_code == 200
    assert client.post("/v1/profiles/poet/canary/stop").json["canary"] is None
    assert client.post("/v1/profiles/poet/retire").json["retired"] is True


def test_rollback_to_the_file(client: FlaskClient) -> None:
    """What was active before may be what was shipped."""
    assert change(client, SHIPPED, "rollback").status_code == 404
    add(client, SHIPPED, "Two.", activate=True)
    assert client.get(f"/v1/profiles/{SHIPPED}").json["previous_version"] == 1
    assert change(client, SHIPPED, "rollback").json["active_version"] == 1
    assert recorded(run(client, SHIPPED).json["id"])[0] == 1
    assert change(client, SHIPPED, "rollback").json["active_version"] == 2


def test_retire(client: FlaskClient) -> None:
    """Nobody can call it, everything of it can still be read, and a rollback brings it back."""
    create(client, "poet", activate=True)
    assert change(client, "poet", "retire", **WHY).json == {"agent": "poet", "retired": True, "previous_version": 1}
    assert run(client, "poet").json["code"] == "unknown_agent"
    shown = client.get("/v1/profiles/poet").json
    assert (shown["retired"], shown["active_version"], shown["previous_version"]) == (True, None, 1)
    assert states(client, "poet") == [(1, "retired")]
    assert "poet" not in {model["id"] for model in client.get("/v1/models").json["data"]}
    assert change(client, "poet", "retire").json["previous_version"] is None
    assert len(events()) == 2
    assert create(client, "poet").json["code"] == "profile_exists"
    assert change(client, "poet", "rollback").json["active_version"] == 1
    assert client.get("/v1/profiles/poet").json["retired"] is False
    assert run(client, "poet").status_code == 202
    assert change(client, "nobody", "retire").json["code"] == "unknown_agent"


def test_retire_what_was_shipped(client: FlaskClient) -> None:
    """For one organization; to the others it is still there."""
    assert change(client, SHIPPED, "retire").json["previous_version"] == 1
    assert run(client, SHIPPED).status_code == 404
    assert SHIPPED not in {model["id"] for model in client.get("/v1/models").json["data"]}
    assert run(connected(client.application, new_key("other")), SHIPPED).status_code == 202
    assert states(client, SHIPPED) == [(1, "retired")]
    assert activate(client, SHIPPED, 1).status_code == 200
    assert run(client, SHIPPED).status_code == 202


def test_history(client: FlaskClient) -> None:
    """Every change in order, as the record has it: what, from what to what, who, why."""
    create(client, "poet", activate=True, **WHY)
    add(client, "poet", "Two.", activate=True)
    change(client, "poet", "rollback", reason="No.")
    client.put("/v1/profiles/poet/canary", json={"version": 2, "share": 0.25, "reason": "Try."})
    change(client, "poet", "canary/stop")
    client.put("/v1/profiles/poet/canary", json={"version": 2, "share": 1})
    change(client, "poet", "canary/promote")
    change(client, "poet", "retire")
    create(client, "other", activate=True)
    shown = client.get("/v1/profiles/poet/history").json
    told = [(one["action"], one["from"], one["to"], one["reason"], one["share"]) for one in shown["data"]]
    assert told == [
        ("retired", 2, None, None, None),
        ("canary_promoted", 1, 2, None, None),
        ("canary_set", None, 2, None, 1),
        ("canary_stopped", 2, None, None, None),
        ("canary_set", None, 2, "Try.", 0.25),
        ("rolled_back", 2, 1, "No.", None),
        ("activated", 1, 2, None, None),
        ("activated", None, 1, WHY["reason"], None),
    ]
    assert {one["by"][:4] for one in shown["data"]} == {"key_"}
    assert shown["data"][-1]["author"] == "Ada"
    recorded_events = [event for event in events() if event.agent_name == "poet"]
    assert [event.request_id for event in recorded_events] == [one["id"] for one in shown["data"]][::-1]
    assert recorded_events[1].profile_version == 2
    assert recorded_events[1].static_profile_hash == shown["data"][-2]["static_profile_hash"] is not None
    page = client.get("/v1/profiles/poet/history?limit=3").json
    assert page == {"data": shown["data"][:3], "has_more": True}
    rest = client.get(f"/v1/profiles/poet/history?limit=5&after={page['data'][-1]['id']}").json
    assert rest == {"data": shown["data"][3:], "has_more": False}
    assert client.get(f"/v1/profiles/{SHIPPED}/history").json == {"data": [], "has_more": False}
    stranger = connected(client.application, new_key("other"))
    assert stranger.get("/v1/profiles/poet/history").status_code == 404


def test_changes_that_cross(client: FlaskClient) -> None:
    """With If-Match, whoever did not see the last change is told; each change makes another state."""
    create(client, "poet", activate=True)
    add(client, "poet", "Two.", activate=True)
    tag = client.get("/v1/profiles/poet").headers["ETag"]
    add(client, "poet", "Three.")
    stale = {"If-Match": tag}
    crossing: list[tuple[str, dict[str, Any]]]
    crossing = [("activate", {"version": 2}), ("rollback", {}), ("retire", {}), ("canary/stop", {})]
    for what, fields in crossing:
        answer = change(client, "poet", what, stale, **fields)
        assert (answer.status_code, answer.json["code"]) == (409, "version_conflict"), what
    answer = client.put("/v1/profiles/poet/canary", json={"version": 2, "share": 0.5}, headers=stale)
    assert answer.status_code == 409
    seen = {tag}
    for what, fields in [*crossing[:2], *crossing[:3], crossing[1]]:
        tag = client.get("/v1/profiles/poet").headers["ETag"]
        assert tag not in seen
        seen.add(tag)
        assert change(client, "poet", what, {"If-Match": tag}, **fields).status_code == 200
    tag = client.get(f"/v1/profiles/{SHIPPED}").headers["ETag"]
    assert change(client, SHIPPED, "retire", {"If-Match": tag}).status_code == 200


def test_rollbacks_at_once(client: FlaskClient) -> None:
    """Of many that go back at once one does; the others saw another state, and do not undo it."""
    create(client, "poet", activate=True)
    add(client, "poet", "Two.", activate=True)
    key, tag = new_key("default"), client.get("/v1/profiles/poet").headers["ETag"]

    def back(_: int) -> int:
        own = connected(client.application, key)
        return int(change(own, "poet", "rollback", {"If-Match": tag}).status_code)

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(back, range(6))) == [200] + [409] * 5
    assert client.get("/v1/profiles/poet").json["active_version"] == 1


@pytest.fixture
def strict(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FlaskClient, FlaskClient]]:
    """Return clients with a member key and an admin key, of a gateway on which only admins change what runs."""
    monkeypatch.setenv(f"{PREFIX}PROFILES__ADMINS_ONLY", "true")
    settings.cache_clear()
    app = build(settings())
    database = Database(settings().database)
    keys = ApiKeys(database, settings().secrets.keys("key_pepper"))
    with app.extensions["closing"]:
        yield tuple(connected(app, keys.create("default", "x", role)[1]) for role in ("member", "admin"))  # type: ignore[misc]
    database.close()


def test_admins_only(strict: tuple[FlaskClient, FlaskClient]) -> None:
    """Where the setting says so, members draft and read, and admins decide what requests get."""
    member, admin = strict
    assert create(member, "poet").status_code == 201
    assert add(member, "poet", "Two.").status_code == 201
    answers = [
        create(member, "other", activate=True),
        add(member, "poet", "Three.", activate=True),
        activate(member, "poet", 1),
        *(change(member, "poet", what) for what in ("rollback", "retire", "canary/stop", "canary/promote")),
        member.put("/v1/profiles/poet/canary", json={"version": 1, "share": 0.5}),
    ]
    assert {(answer.status_code, answer.json["code"]) for answer in answers} == {(403, "admin_required")}
    assert events() == []
    assert activate(admin, "poet", 1).status_code == 200
    assert member.get("/v1/profiles/poet/history").json["data"][0]["action"] == "activated"


def test_bad_changes(client: FlaskClient) -> None:
    """A problem document each, and nothing recorded."""
    create(client, "poet")
    bad: dict[str, dict[str, Any]] = {
        "rollback": {"version": 0},
        "retire": {"version": 1},
        "activate": {"version": 1, "rebase": "yes"},
        "canary/stop": {"reason": ""},
        "canary/promote": {"reason": "a\nb"},
    }
    for what, fields in bad.items():
        answer = change(client, "poet", what, **fields)
        assert (answer.status_code, answer.json["code"]) == (422, "invalid_request"), what
    long: list[dict[str, Any]] = [{"reason": "x" * 501}, {"author": "x" * 201}, {"author": "\x00"}, {"reason": 5}]
    for fields in long:
        assert change(client, "poet", "activate", version=1, **fields).status_code == 422
    for share in (-0.1, 1.1, "0.5", None, True, 1e400):
        answer = client.put("/v1/profiles/poet/canary", json={"version": 1, "share": share})
        assert answer.status_code in (400, 422), share
    assert client.get("/v1/profiles/poet/history?after=gw_x").status_code == 422
    assert client.get(f"/v1/profiles/poet/history?after={new_request_id()}").json["data"] == []
    for what in ("history", "canary", "export"):
        assert client.get(f"/v1/profiles/nobody/{what}").json["code"] == "unknown_agent"
        assert client.get(f"/v1/profiles/%00/{what}").json["code"] == "not_found"
    assert events() == []
