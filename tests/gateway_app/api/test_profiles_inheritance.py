"""Profiles that extend others: what they share, what they are pinned to, and what cannot be extended."""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from tasks.crypto import KeyWrapper, unseal
from tasks.prompts.packing import unpack
from tasks.schema import audit_events, profiles
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.profile_calls import (
    SHIPPED,
    activate,
    base,
    change,
    connected,
    create,
    draft,
    events,
    read,
    recorded,
    run,
)

HOUSE = "You work for the house. " * 20


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return one kind of database: the statements are tried on both by the tests of switching and of canaries."""
    kind: str = request.param
    return kind


def static_ids(static_profile_hash: str) -> list[int]:
    """Return the token ids that workers have of a profile."""
    row = read(sa.select(profiles).where(profiles.c.static_profile_hash == static_profile_hash))[0]
    key = KeyWrapper(settings().secrets.keys("master_key")).unwrap(row.data_key, static_profile_hash)
    return unpack(unseal(key, row.static_token_ids, static_profile_hash))


def test_roles_of_one_base_share_their_beginning(client: FlaskClient) -> None:
    """Token for token up to where the base ends, as if each held its text itself; the KV cache can share that."""
    assert base(client, "house", HOUSE).status_code == 201
    made = [draft(client, name, "house", f"{name}.", activate=True).json for name in ("poet", "painter")]
    create(client, "alone", "unused")
    segments = [{"kind": "agent_base_profile", "text": HOUSE}, {"kind": "role", "text": "poet."}]
    whole = client.post("/v1/profiles/alone/versions", json={"segments": segments, "activate": True}).json
    assert whole["static_profile_hash"] == made[0]["static_profile_hash"] != made[1]["static_profile_hash"]
    one, two = (static_ids(each["static_profile_hash"]) for each in made)
    alone = static_ids(client.get("/v1/profiles/house").json["static_profile_hash"])
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
    # All of the base but its last control token, and what a merge over its border may change.
    assert shared >= len(alone) - 6 > 50
    assert run(client, "poet").json["prompt_tokens"] > shared


def test_bases_are_for_extending(client: FlaskClient) -> None:
    """An abstract one is no model and no agent; what extends it is."""
    base(client, "house", HOUSE)
    draft(client, "poet", "house", "Poet.", activate=True)
    assert run(client, "house").json["code"] == "unknown_agent"
    assert run(client, "poet").status_code == 202
    models = {model["id"] for model in client.get("/v1/models").json["data"]}
    assert "poet" in models
    assert not models & {"house", "engineering-base"}
    shown = {item["agent"]: item["abstract"] for item in client.get("/v1/profiles?limit=100").json["data"]}
    assert (shown["house"], shown["poet"], shown["engineering-base"]) == (True, False, True)


def test_a_shipped_base(client: FlaskClient) -> None:
    """Files are bases, too; and a role of one's own on a shipped base shares the cache of those that are shipped."""
    made = draft(client, "poet", "engineering-base", "Poet.", activate=True).json
    assert made["active"]["pins"] == [{"agent": "engineering-base", "version": 1}]
    shipped = client.get(f"/v1/profiles/{SHIPPED}").json
    assert shipped["active"]["pins"] == made["active"]["pins"]
    run(client, SHIPPED)
    one, two = (static_ids(each["static_profile_hash"]) for each in (made, shipped))
    assert sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))) > 200


@pytest.mark.parametrize("database_kind", ["sqlite", "postgresql"], indirect=True)
def test_a_version_stays_what_it_was(client: FlaskClient) -> None:
    """Whatever is done to a base, nothing changes before somebody rebases; then a new number tells the difference."""
    base(client, "house", "House one.")
    made = draft(client, "poet", "house", "Poet.", activate=True).json
    hashed = made["static_profile_hash"]
    assert (made["behind"], made["active"]["extends"]) == (None, "house")
    assert made["active"]["pins"] == [{"agent": "house", "version": 1}]
    base(client, "house", "House two.")
    assert client.get("/v1/profiles/house").json["children_behind"] == ["poet"]
    assert activate(client, "house", 1).json["children_behind"] == []
    assert activate(client, "house", 2).json["children_behind"] == ["poet"]
    shown = client.get("/v1/profiles/poet").json
    assert shown["behind"] == {"agent": "house", "pinned": 1, "active": 2}
    assert recorded(run(client, "poet").json["id"]) == (1, hashed)
    # To activate it again is to have it again: the same number is the same text for good.
    assert activate(client, "poet", 1).json["static_profile_hash"] == hashed
    rebased = change(client, "poet", "activate", version=1, rebase=True, reason="House style.").json
    assert (rebased["active_version"], rebased["previous_version"]) == (2, 1)
    assert rebased["static_profile_hash"] != hashed
    shown = client.get("/v1/profiles/poet").json
    assert (shown["behind"], shown["active"]["pins"]) == (None, [{"agent": "house", "version": 2}])
    assert client.get("/v1/profiles/house").json["children_behind"] == []
    assert events()[-1].details | {"author": None} == {
        "action": "activated", "agent": "poet", "from": 1, "to": 2, "reason": "House style.", "rebased_from": 1,
        "pins": [["house", 2]], "author": None,
    }  # fmt: skip
    # Nothing has moved since, so the same again adds nothing.
    assert change(client, "poet", "activate", version=2, rebase=True).json["active_version"] == 2
    assert change(client, "poet", "rollback").json["static_profile_hash"] == hashed
    assert client.get("/v1/profiles/poet/diff?from=1&to=2").json["changes"] == []


def test_a_draft_is_pinned_when_it_is_first_used(client: FlaskClient) -> None:
    """Not when it is written: until then it follows its base."""
    base(client, "house", "House one.")
    made = draft(client, "poet", "house", "Poet.").json
    assert made["versions"][0]["pins"] is None
    base(client, "house", "House two.")
    activate(client, "poet", 1)
    assert client.get("/v1/profiles/poet").json["active"]["pins"] == [{"agent": "house", "version": 2}]


def test_bases_of_bases(client: FlaskClient) -> None:
    """Text and numbers of all are settled together; a middle one that is behind does not make its children so."""
    base(client, "firm", "Firm one.")
    base(client, "house", "House.", extends="firm")
    made = draft(client, "poet", "house", "Poet.", activate=True).json
    pins = [{"agent": "house", "version": 1}, {"agent": "firm", "version": 1}]
    assert made["active"]["pins"] == pins
    base(client, "firm", "Firm two.")
    assert client.get("/v1/profiles/firm").json["children_behind"] == ["house"]
    assert client.get("/v1/profiles/poet").json["behind"] is None
    change(client, "house", "activate", version=1, rebase=True)
    assert client.get("/v1/profiles/poet").json["behind"] == {"agent": "house", "pinned": 1, "active": 2}
    change(client, "poet", "activate", version=1, rebase=True)
    pins = [{"agent": "house", "version": 2}, {"agent": "firm", "version": 2}]
    assert client.get("/v1/profiles/poet").json["active"]["pins"] == pins


def test_what_cannot_be_extended(client: FlaskClient) -> None:
    """Each is told, and leaves everything as it was."""

    def refused(answer: Any, told: str) -> None:
        assert (answer.status_code, answer.json["code"]) == (422, "base_unusable"), answer.text
        assert told in answer.json["detail"]

    refused(draft(client, "poet", "nobody", "Poet."), "no agent named 'nobody'")
    refused(draft(client, "poet", "poet", "Poet."), "cannot extend itself")
    stranger = connected(client.application, new_key("other"))
    base(stranger, "theirs", "Theirs.")
    refused(draft(client, "poet", "theirs", "Poet."), "no agent named 'theirs'")
    assert client.get("/v1/profiles/poet").status_code == 404
    draft(client, "idle", None, "Not active yet.")
    draft(client, "poet", "idle", "Poet.")
    refused(activate(client, "poet", 1), "no version of 'idle' is active")
    refused(client.put("/v1/profiles/poet/canary", json={"version": 1, "share": 0.5}), "no version of 'idle'")
    activate(client, "idle", 1)
    activate(client, "poet", 1)
    add_on = {"extends": "poet", "segments": [{"kind": "tools", "text": "x"}]}
    circle = client.post("/v1/profiles/idle/versions", json=add_on)
    assert circle.status_code == 201
    refused(activate(client, "idle", 2), "'idle' would extend itself: idle extends poet extends idle")
    house = {"extends": "idle", "segments": [{"kind": "agent_base_profile", "text": "x"}], "activate": True}
    refused(client.post("/v1/profiles", json={"agent": "late", **house}), "not in the order")
    names = ["poet", "p2", "p3", "p4", "p5"]
    made = [draft(client, name, above, "x", activate=True) for above, name in pairwise(names)]
    assert [answer.status_code for answer in made] == [201, 201, 201, 422]
    refused(made[-1], "at most 4 profiles may stand above one another")
    change(client, "idle", "retire")
    assert run(client, "poet").status_code == 202
    draft(client, "other", "idle", "x")
    refused(activate(client, "other", 1), "no version of 'idle' is active")


def test_a_base_that_makes_it_too_long(client: FlaskClient) -> None:
    """What is too long with its base is not used, and not pinned either: a shorter base makes it usable."""
    assert base(client, "house", "word " * 600).status_code == 201
    draft(client, "poet", "house", "word " * 600)
    assert activate(client, "poet", 1).json["code"] == "profile_unusable"
    base(client, "house", "Short.")
    assert activate(client, "poet", 1).status_code == 200
    assert client.get("/v1/profiles/poet").json["active"]["pins"] == [{"agent": "house", "version": 2}]


def test_exchanges(client: FlaskClient) -> None:
    """They are stored, shown and compared, go before the caller's messages, and a base can have them, too."""
    examples = [{"user": "Rain?", "assistant": "It pours."}]
    segments = [{"kind": "role", "text": "Poet."}, {"kind": "few_shot", "examples": examples}]
    made = client.post("/v1/profiles", json={"agent": "poet", "segments": segments, "activate": True})
    assert made.json["active"]["segments"] == segments
    without = create(client, "other", activate=True).json["static_token_count"]
    assert made.json["static_token_count"] > without
    assert run(client, "poet").json["prompt_tokens"] > made.json["static_token_count"]
    more = [*segments, {"kind": "few_shot", "examples": [{"user": "Sun?", "assistant": "It burns."}]}]
    client.post("/v1/profiles/poet/versions", json={"segments": more})
    (one,) = client.get("/v1/profiles/poet/diff?from=1&to=2").json["changes"]
    assert (one["kind"], one["change"], "It burns." in one["diff"]) == ("few_shot", "added", True)
    child = draft(client, "child", "poet", "Role after exchanges.", activate=True)
    assert "not in the order" in child.json["detail"]
    alone = {"agent": "child", "extends": "poet", "segments": more[2:], "activate": True}
    assert client.post("/v1/profiles", json=alone).status_code == 201


def test_inherited_text_is_sealed(client: FlaskClient) -> None:
    """As the profile's own is, wherever it is kept."""
    base(client, "house", "xyzzy-inherited")
    draft(client, "poet", "house", "Poet.", activate=True)
    for table in ("profile_versions", "agents", "audit_events"):
        assert not any(
            b"xyzzy" in str(value).encode() for row in read(sa.text(f"SELECT * FROM {table}")) for value in row
        )
    assert read(sa.select(sa.func.count()).select_from(audit_events))[0][0] == 2


@pytest.fixture
def alone(configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no profile extend another."""
    monkeypatch.setenv(f"{PREFIX}PROFILES__MAX_DEPTH", "0")
    settings.cache_clear()


def test_depth_is_a_setting(alone: None, client: FlaskClient) -> None:
    """None may be extended where it is 0; drafts are still taken."""
    base(client, "house", HOUSE)
    assert draft(client, "poet", "house", "Poet.").status_code == 201
    assert "at most 0" in activate(client, "poet", 1).json["detail"]
