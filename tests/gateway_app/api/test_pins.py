"""Pinned agents: who may pin, what is recorded, and that Redis wishes for what SQL says, whatever either loses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app import build
from gateway_app.housekeeping.pins import PinnedProfiles
from gateway_app.profiles.pinned import pinned_parts
from gateway_app.profiles.wishes import Wishes
from tasks.db import Database
from tasks.queueing.keys import QueueKeys
from tasks.schema import profiles as static_parts
from tasks.settings import PREFIX, settings
from tests.conftest import ROOT, new_key
from tests.profile_calls import SHIPPED, activate, add, base, change, connected, create, events, write

#: For what has no statements of its own.
on_sqlite = pytest.mark.parametrize("database_kind", ["sqlite"])
WHY: dict[str, Any] = {"author": "Ada", "reason": "It is asked for all day."}
PINNED = {"copies": 2, **WHY}


@pytest.fixture
def wishes(client: FlaskClient, redis_url: str) -> Iterator[Wishes]:
    """Return what the gateway's Redis is wished for."""
    del client
    with redis.Redis.from_url(redis_url) as connection:
        yield Wishes(connection, QueueKeys("metaqore:"))


@pytest.fixture
def keeper(wishes: Wishes) -> Iterator[PinnedProfiles]:
    """Return the housekeeper's chore."""
    database = Database(settings().database)
    yield PinnedProfiles(database, wishes)
    database.close()


def pin(client: FlaskClient, agent: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    """Pin an agent."""
    return client.put(f"/v1/profiles/{agent}/pin", json=body, headers=headers or {})


def hash_of(client: FlaskClient, agent: str) -> str:
    """Return the hash of an agent's active version."""
    found = client.get(f"/v1/profiles/{agent}").json["static_profile_hash"]
    assert isinstance(found, str)
    return found


def test_pin_and_unpin(client: FlaskClient, wishes: Wishes) -> None:
    """It is wished for, shown, recorded with who and why, and ended again."""
    create(client, "poet", activate=True)
    hashed = hash_of(client, "poet")
    nothing = client.get("/v1/profiles/poet/pin").json
    assert (nothing["copies"], nothing["workers"]) == (0, [])
    pinned = pin(client, "poet", **PINNED)
    assert pinned.json == {
        "agent": "poet",
        "copies": 2,
        "active_version": 1,
        "static_profile_hash": hashed,
        "workers": [],
        "computing": [],
    }
    assert wishes.lasting() == {hashed: 2}
    assert client.get("/v1/profiles/poet/pin").json == pinned.json
    assert client.get("/v1/profiles/poet").json["pinned_copies"] == 2
    assert pin(client, "poet").json["copies"] == 1
    assert wishes.lasting() == {hashed: 1}
    unpinned = client.delete("/v1/profiles/poet/pin?author=Ada&reason=Quiet now.")
    assert (unpinned.status_code, unpinned.json["copies"]) == (200, 0)
    assert wishes.lasting() == {}
    assert client.get("/v1/profiles/poet").json["pinned_copies"] == 0
    again = client.delete("/v1/profiles/poet/pin")
    assert (again.status_code, again.json["code"]) == (404, "not_found")
    changes = client.get("/v1/profiles/poet/history").json["data"]
    assert [(each["action"], each["copies"]) for each in changes] == [
        *(("unpinned", None), ("pinned", 1), ("pinned", 2)),
        ("activated", None),
    ]
    assert (changes[0]["author"], changes[0]["reason"], changes[2]["reason"]) == ("Ada", "Quiet now.", WHY["reason"])
    assert {(each["from"], each["to"]) for each in changes[:3]} == {(1, 1)}
    assert [event.details["action"] for event in events()] == ["activated", "pinned", "pinned", "unpinned"]
    assert events()[1].static_profile_hash == hashed


def test_the_pin_follows_the_active_version(client: FlaskClient, wishes: Wishes) -> None:
    """Whatever makes another version active takes it along, and lets go of the one before."""
    create(client, "poet", activate=True)
    pin(client, "poet", **PINNED)
    first = hash_of(client, "poet")
    add(client, "poet", "Two.", activate=True)
    second = hash_of(client, "poet")
    assert wishes.lasting() == {second: 2}
    add(client, "poet", "Three.")
    assert wishes.lasting() == {second: 2}
    third = activate(client, "poet", 3).json["static_profile_hash"]
    assert wishes.lasting() == {third: 2}
    change(client, "poet", "rollback")
    assert wishes.lasting() == {second: 2}
    client.put("/v1/profiles/poet/canary", json={"version": 1, "share": 0.5})
    assert wishes.lasting() == {second: 2}
    client.post("/v1/profiles/poet/canary/promote")
    assert wishes.lasting() == {first: 2}
    change(client, "poet", "retire")
    assert wishes.lasting() == {}
    assert client.get("/v1/profiles/poet/pin").json["workers"] is None
    activate(client, "poet", 3)
    assert wishes.lasting() == {third: 2}


@on_sqlite
def test_rebasing_takes_the_pin_along(client: FlaskClient, wishes: Wishes) -> None:
    """The version that is added has another hash."""
    base(client, "house", "House.")
    create(client, "poet", extends="house", activate=True, segments=[{"kind": "role", "text": "One."}])
    pin(client, "poet")
    base(client, "house", "House, changed.")
    moved = change(client, "poet", "activate", version=1, rebase=True).json
    assert moved["active_version"] == 2
    assert wishes.lasting() == {moved["static_profile_hash"]: 1}


@on_sqlite
def test_a_shipped_agent(client: FlaskClient, wishes: Wishes) -> None:
    """It is pinned for one organization, whose hash it is, and goes on following its file."""
    hashed = pin(client, SHIPPED).json["static_profile_hash"]
    other = connected(client.application, new_key("other"))
    assert other.get(f"/v1/profiles/{SHIPPED}/pin").json["copies"] == 0
    assert wishes.lasting() == {hashed: 1}
    shown = client.get(f"/v1/profiles/{SHIPPED}").json
    assert (shown["active_version"], shown["source"], shown["newest_version"]) == (1, "file", 1)
    theirs = pin(other, SHIPPED, copies=3).json["static_profile_hash"]
    assert wishes.lasting() == {hashed: 1, theirs: 3}
    client.delete(f"/v1/profiles/{SHIPPED}/pin")
    assert wishes.lasting() == {theirs: 3}


def test_agents_with_the_same_text(client: FlaskClient, wishes: Wishes) -> None:
    """They share a static part: it is kept for as long as one of them is pinned, for the one that wants more."""
    for agent in ("poet", "bard"):
        create(client, agent, activate=True)
    hashed = hash_of(client, "poet")
    assert hash_of(client, "bard") == hashed
    pin(client, "poet", copies=3)
    pin(client, "bard", copies=2)
    assert wishes.lasting() == {hashed: 3}
    client.delete("/v1/profiles/poet/pin")
    assert wishes.lasting() == {hashed: 2}
    client.delete("/v1/profiles/bard/pin")
    assert wishes.lasting() == {}


@on_sqlite
def test_what_cannot_be_pinned(client: FlaskClient, wishes: Wishes) -> None:
    """Each refusal says why, and changes nothing."""
    base(client, "house", "House.")
    create(client, "draft")
    create(client, "gone", activate=True)
    change(client, "gone", "retire")
    for agent in ("nobody", "house", "draft", "gone"):
        assert pin(client, agent).json["code"] == "unknown_agent", agent
    for copies in (0, 65, "2"):
        assert pin(client, SHIPPED, copies=copies).status_code == 422
    stale = pin(client, SHIPPED, {"If-Match": '"7.7.7"'})
    assert (stale.status_code, stale.json["code"]) == (409, "version_conflict")
    assert client.delete("/v1/profiles/nobody/pin").json["code"] == "unknown_agent"
    assert wishes.lasting() == {}
    assert [event.details["action"] for event in events()] == ["activated", "activated", "retired"]


def test_as_many_as_are_allowed(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one organization; another is not in its way, and a pin that is there can be changed."""
    monkeypatch.setenv(f"{PREFIX}PROFILES__MAX_PINNED", "1")
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        one, two = connected(app, new_key("default")), connected(app, new_key("other"))
        create(one, "poet", activate=True)
        assert pin(one, "poet").status_code == 200
        refused = pin(one, SHIPPED)
        assert (refused.json["code"], refused.json["limit"]) == ("profile_limit", 1)
        assert pin(one, "poet", copies=5).json["copies"] == 5
        assert pin(two, SHIPPED).status_code == 200


@on_sqlite
def test_where_only_admins_may(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with whatever changes what requests get; all may look."""
    monkeypatch.setenv(f"{PREFIX}PROFILES__ADMINS_ONLY", "true")
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        member, admin = connected(app, new_key("default")), connected(app, new_key("default", "admin"))
        assert pin(member, SHIPPED).json["code"] == "admin_required"
        assert pin(admin, SHIPPED).status_code == 200
        assert member.delete(f"/v1/profiles/{SHIPPED}/pin").json["code"] == "admin_required"
        assert member.get(f"/v1/profiles/{SHIPPED}/pin").json["copies"] == 1


def test_a_redis_that_lost_everything(client: FlaskClient, wishes: Wishes, keeper: PinnedProfiles) -> None:
    """The housekeeper tells it again; what it wishes for without a pin, that ends. What ends by itself is left alone."""
    create(client, "poet", activate=True)
    pin(client, "poet", **PINNED)
    theirs = pin(connected(client.application, new_key("other")), SHIPPED).json["static_profile_hash"]
    pinned = {hash_of(client, "poet"): 2, theirs: 1}
    assert keeper.renew() == 0
    connection = redis.Redis.from_url(settings().gateway.request_queue_url)
    connection.flushall()
    assert keeper.renew() == 2
    assert wishes.lasting() == pinned
    wanted = QueueKeys("metaqore:").named("wanted")
    connection.hset(wanted, "f" * 64, '{"until": 0, "copies": 1}')
    connection.hset(wanted, "e" * 64, "what is this")
    connection.hset(wanted, "d" * 64, '{"until": 9e9, "copies": 1}')
    connection.hset(wanted, theirs, '{"until": 0, "copies": 9}')
    assert keeper.renew() == 3
    assert wishes.lasting() == pinned
    assert connection.hexists(wanted, "d" * 64)
    connection.delete(wanted)
    connection.set(wanted, "no hash")
    assert keeper.renew() == 0
    connection.close()


@on_sqlite
def test_without_redis(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, wishes: Wishes, keeper: PinnedProfiles
) -> None:
    """A pin is made all the same, and Redis hears of it later."""
    with monkeypatch.context() as away:
        for name in ("say", "end", "look"):
            away.setattr(Wishes, name, _away)
        pinned = pin(client, SHIPPED)
        assert (pinned.status_code, pinned.json["copies"], pinned.json["workers"]) == (200, 1, None)
    assert wishes.lasting() == {}
    assert keeper.renew() == 1
    assert wishes.lasting() == {pinned.json["static_profile_hash"]: 1}


def test_a_release_with_another_file(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, wishes: Wishes, tmp_path: Path
) -> None:
    """A process that starts has its text kept instead, without a word in the record: nobody changed the agent."""
    create(client, "poet", activate=True)
    own, old = (pin(client, agent).json["static_profile_hash"] for agent in ("poet", SHIPPED))
    pin(client, "contract-validator")
    change(client, "contract-validator", "retire")
    recorded = len(events())
    assert client.application.extensions["pins"].catch_up() == 0
    for file in ROOT.joinpath("profiles").glob("*.yaml"):
        text = file.read_text("utf-8")
        if file.stem == SHIPPED:
            text = text.replace("version: 1", "version: 2").replace("text: |", "text: |\n      Changed.", 1)
        (tmp_path / file.name).write_text(text, "utf-8")
    monkeypatch.setenv(f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY", str(tmp_path))
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        assert app.extensions["pins"].catch_up() == 1
        assert app.extensions["pins"].catch_up() == 0
        new = hash_of(connected(app, new_key("default")), SHIPPED)
    assert new != old
    assert wishes.lasting() == {own: 1, new: 1}
    assert len(events()) == recorded


def test_what_the_housekeeper_reads(client: FlaskClient, keeper: PinnedProfiles) -> None:
    """Whose it is, its length and its chain; a gateway of the release before stored no chain."""
    del keeper
    hashed = pin(client, SHIPPED).json["static_profile_hash"]
    database = Database(settings().database)
    try:
        ((wanted, copies),) = database.read(pinned_parts)
        assert (wanted.organization, wanted.static_profile_hash, copies) == ("default", hashed, 1)
        assert wanted.static_tokens == client.get(f"/v1/profiles/{SHIPPED}").json["static_token_count"] > 0
        write(sa.update(static_parts).values(chain=None))
        ((wanted, _),) = database.read(pinned_parts)
        assert wanted.chain == ()
    finally:
        database.close()


def _away(*_arguments: Any, **_more: Any) -> Any:
    raise redis.ConnectionError("away")
