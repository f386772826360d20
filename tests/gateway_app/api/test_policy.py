"""`/v1/policy`: admin keys change it, nobody's change is lost, and what it says is what happens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient

from gateway_app.governance.api_keys import Role
from tasks.db import Database
from tasks.errors import PolicyConflict
from tasks.governance import policies as policies_module
from tasks.governance.decision import Detection
from tasks.governance.policies import Change, Policies, PolicyVersion
from tasks.governance.secure_gateway import POLICIES
from tasks.ids import is_request_id
from tasks.schema import audit_events
from tasks.schema_governance import DETECTION_MODES
from tasks.schema_governance import policies as table
from tasks.settings import settings
from tests.conftest import new_key

TASK = {"agent": "incident-responder", "directive": "What now?"}
ANY = {"If-Match": "*"}


def connected(app: Flask, organization: str = "default", role: Role = "admin") -> FlaskClient:
    """Return a client with a key of its own."""
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key(organization, role)}"
    return client


@pytest.fixture
def admin(client: FlaskClient) -> FlaskClient:
    """Return a client of the same gateway that may change the policy."""
    return connected(client.application)


def put(client: FlaskClient, policy: str, version: int | None = None, **fields: Any) -> Any:
    """Put a policy into force; without a version, whatever is in force."""
    headers = ANY if version is None else {"If-Match": f'"{version}"'}
    return client.put("/v1/policy", json={"policy": policy, **fields}, headers=headers)


def read(query: sa.Select[Any]) -> list[Any]:
    """Run a query on the gateway's database."""
    database = Database(settings().database)
    try:
        return database.read(lambda connection: list(connection.execute(query)))
    finally:
        database.close()


def changes() -> list[Any]:
    """Return the events of changes, the oldest first."""
    query = sa.select(audit_events).where(audit_events.c.kind == "policy_changed")
    return read(query.order_by(audit_events.c.request_id))


def event_of(request_id: str, kind: str) -> Any:
    """Return one event of a request."""
    mine = (audit_events.c.request_id == request_id, audit_events.c.kind == kind)
    return read(sa.select(audit_events).where(*mine))[0]


# --- A change -------------------------------------------------------------------------------------


def test_a_policy_and_its_history(client: FlaskClient, admin: FlaskClient) -> None:
    """From the settings' to one of the organization's own, and on: each is a version, an event, and what is decided by."""
    first = client.get("/v1/policy")
    assert first.headers["ETag"] == '"0"'
    assert first.json == {
        "version": 0,
        "policy": "default_local_first",
        "detection": "record",
        "created_at": None,
        "created_by": None,
        "reason": None,
    }
    changed = put(admin, " Enterprise ", 0, detection="raise", reason="Ein neuer Vertrag: Müller & Söhne.")
    assert (changed.status_code, changed.headers["ETag"]) == (200, '"1"'), changed.text
    assert (changed.json["policy"], changed.json["detection"]) == ("enterprise_residency", "raise")
    assert changed.json["created_by"].startswith("key_")
    assert client.get("/v1/policy").json == changed.json
    second = put(admin, "local-only", 1)
    assert (second.json["version"], second.json["detection"], second.json["reason"]) == (2, "raise", None)
    listed = client.get("/v1/policy/versions").json
    assert [entry["version"] for entry in listed["data"]] == [2, 1]
    assert (listed["data"][1], listed["has_more"]) == (changed.json, False)

    one, two = changes()
    assert is_request_id(one.request_id)
    assert (one.organization, one.api_key_id, one.attempt, one.epoch) == ("default", changed.json["created_by"], 0, 0)
    assert (one.policy, one.reason) == ("enterprise_residency", "Ein neuer Vertrag: Müller & Söhne.")
    assert one.details == {
        "version": 1,
        "previous_version": 0,
        "from": {"policy": "default_local_first", "detection": "record"},
        "to": {"policy": "enterprise_residency", "detection": "raise"},
    }
    assert (two.details["version"], two.details["to"]["policy"]) == (2, "compliance_local_only")
    view = sa.select(sa.func.count()).select_from(sa.table("audit_requests"))
    assert read(view)[0][0] == 0


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_any_alias(admin: FlaskClient) -> None:
    """Whatever it is called by, its full name is what is kept."""
    for alias, name in {
        "default": "default_local_first",
        "residency": "enterprise_residency",
        "LOCAL-FIRST": "default_local_first",
        "  Compliance\t": "compliance_local_only",
        "Enterprise-Residency": "enterprise_residency",
    }.items():
        assert put(admin, alias).json["policy"] == name


def test_what_is_in_force_decides(client: FlaskClient, admin: FlaskClient) -> None:
    """The next request is decided by the new version, and its event names it."""
    hinted = {**TASK, "provider_hint": "openrouter"}
    before = client.post("/v1/tasks", json=hinted).json
    assert before["veto"]["reason"] == "Provider 'openrouter' unavailable"
    put(admin, "compliance")
    after = client.post("/v1/tasks", json=hinted)
    assert after.status_code == 403
    assert after.json["veto"] == {
        "reason": "Provider 'openrouter' disallowed for public tasks",
        "policy_violated": "compliance_local_only",
        "severity": "critical",
        "details": {"policy": "compliance_local_only"},
    }
    vetoed = event_of(after.json["request_id"], "vetoed")
    assert (vetoed.policy, vetoed.provider, vetoed.sensitivity) == ("compliance_local_only", "openrouter", "public")
    assert vetoed.details == {
        "flags": {"private": False, "sensitive": False, "security": False},
        "policy_version": 1,
        "detection": "record",
        "provider_hint": "openrouter",
        "veto": after.json["veto"],
        "vetoed_by": "policy",
    }
    admitted = event_of(client.post("/v1/tasks", json={**TASK, "is_security_task": True}).json["id"], "admitted")
    assert (admitted.policy, admitted.reason) == ("compliance_local_only", "auto_recommendation")
    assert admitted.details["policy_version"] == 1
    assert admitted.details["flags"] == {"private": False, "sensitive": False, "security": True}


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_organizations_are_apart(client: FlaskClient, admin: FlaskClient) -> None:
    """One's policy is nothing to the other, nor its history."""
    stranger = connected(client.application, "globex")
    put(admin, "compliance")
    assert stranger.get("/v1/policy").json["version"] == 0
    assert stranger.get("/v1/policy/versions").json == {"data": [], "has_more": False}
    put(stranger, "enterprise", 0)
    assert client.get("/v1/policy").json["policy"] == "compliance_local_only"


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_the_same_again_is_no_new_version(admin: FlaskClient) -> None:
    """A client that repeats a change whose answer it lost makes no second one; the settings' may be made one's own."""
    assert put(admin, "default").json["version"] == 1
    assert put(admin, "default", reason="again").json == put(admin, "local_first", 1).json
    assert len(changes()) == 1


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_pages_of_versions(admin: FlaskClient) -> None:
    """The newest first, each once, whatever the page's size."""
    for number in range(5):
        put(admin, ("default", "compliance")[number % 2])
    seen, before = [], None
    while True:
        page = admin.get("/v1/policy/versions", query_string={"limit": 2} | ({"before": before} if before else {})).json
        seen += [entry["version"] for entry in page["data"]]
        if not page["has_more"]:
            break
        before = seen[-1]
    assert seen == [5, 4, 3, 2, 1]


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_member_may_read_and_not_change(client: FlaskClient) -> None:
    """Whatever the body is: who may not is told so first, and nothing is left of it."""
    for body in ({"policy": "default"}, {"policy": "nonsense"}, None):
        refused = client.put("/v1/policy", json=body, headers=ANY)
        assert (refused.status_code, refused.json["code"]) == (403, "admin_required")
    assert client.get("/v1/policy").json["version"] == 0
    assert changes() == []
    stranger = client.application.test_client()
    assert stranger.put("/v1/policy", json={"policy": "default"}).status_code == 401
    assert stranger.get("/v1/policy").status_code == 401


#: What If-Match says of version 1, and what comes of it.
TAGS: list[tuple[str | None, int]] = [
    (None, 428),
    ("", 428),
    ("   ", 428),
    ('"1"', 200),
    ('W/"1"', 200),
    ('"0", "1"', 200),
    ("*", 200),
    ('"0"', 412),
    ('"2"', 412),
    ('"x"', 412),
    ('"-1"', 412),
    ('"1.0"', 412),
    ('"' + "9" * 4000 + '"', 412),
    ('"¹"', 412),
    ("nonsense", 412),
]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_which_version_is_replaced(admin: FlaskClient) -> None:
    """A change says what it changes; one made to an older version is refused, and says what is in force."""
    version = put(admin, "enterprise").json["version"]
    for tags, status in TAGS:
        headers = {} if tags is None else {"If-Match": tags.replace("1", str(version), 1)}
        wanted = "compliance" if version % 2 else "enterprise"
        answer = admin.put("/v1/policy", json={"policy": wanted}, headers=headers)
        assert answer.status_code == status, (tags, answer.text)
        if status == 412:
            assert (answer.json["code"], answer.json["policy_version"]) == ("policy_conflict", version)
        if status == 428:
            assert answer.json["code"] == "precondition_required"
        version += status == 200
        assert admin.get("/v1/policy").json["version"] == version


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({}, "invalid_request"),
    ({"policy": "SECRET-WORD"}, "unknown_policy"),
    ({"policy": "enterprı̇se"}, "unknown_policy"),
    ({"policy": ""}, "invalid_request"),
    ({"policy": "x" * 201}, "invalid_request"),
    ({"policy": None}, "invalid_request"),
    ({"policy": ["default"]}, "invalid_request"),
    ({"policy": "default", "detection": "SECRET-WORD"}, "invalid_request"),
    ({"policy": "default", "detection": "Raise"}, "invalid_request"),
    ({"policy": "default", "reason": "x" * 501}, "invalid_request"),
    ({"policy": "default", "reason": "SECRET-WORD\x00"}, "invalid_request"),
    ({"policy": "default", "reason": "a\nb"}, "invalid_request"),
    ({"policy": "default", "reason": 7}, "invalid_request"),
    ({"policy": "default", "version": 4}, "invalid_request"),
]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_bad_bodies(admin: FlaskClient) -> None:
    """Each is refused, with nothing of it repeated and nothing changed."""
    for fields, code in BAD_FIELDS:
        refused = admin.put("/v1/policy", json=fields, headers=ANY)
        assert (refused.status_code, refused.json["code"]) == (422, code), fields
        assert "SECRET-WORD" not in refused.text
    assert changes() == []


NO_BODIES = [
    (b"", "application/json", 400),
    (b"{", "application/json", 400),
    (b"[]", "application/json", 422),
    (b'{"policy": "\xff"}', "application/json", 400),
    (b'{"policy": "default"}', "text/plain", 415),
    (b'{"policy": "' + b"x" * 5_000_000 + b'"}', "application/json", 413),
]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_what_is_no_body(admin: FlaskClient) -> None:
    """As everywhere in this API."""
    for body, content_type, status in NO_BODIES:
        answer = admin.put("/v1/policy", data=body, content_type=content_type, headers=ANY)
        assert answer.status_code == status, body[:40]


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_bad_queries(client: FlaskClient) -> None:
    """Refused, not guessed."""
    for query in ("before=0", "before=x", "limit=0", "limit=101", "before=99999999999999", "a=b", "limit=1&limit=2"):
        assert client.get(f"/v1/policy/versions?{query}").status_code == 422, query


def test_the_longest_reason(admin: FlaskClient) -> None:
    """It fits the table and the record."""
    reason = "ü" * 500
    assert put(admin, "default", reason=reason).json["reason"] == reason
    assert changes()[0].reason == reason


# --- Others at the same time ----------------------------------------------------------------------


@pytest.fixture
def store(client: FlaskClient) -> Any:
    """Return what makes policies as other processes have them, each with a connection of its own."""
    opened: list[Database] = []

    def make(**options: Any) -> Policies:
        opened.append(Database(settings().database))
        return Policies(opened[-1], PolicyVersion(0, "default_local_first", "off"), **options)

    yield make
    for database in opened:
        database.close()


def test_writers_at_once_never_make_one_version_twice(store: Any) -> None:
    """Of those that change the same version exactly one wins, and each other is told what is in force."""
    stores = [store() for _ in range(4)]
    start = threading.Barrier(len(stores))
    won: list[int] = []
    lost: list[int] = []

    def write(policies: Policies) -> None:
        for step in range(5):
            wanted = Change("key_1", sorted(POLICIES)[step % 3], "off", expected={step})
            start.wait()
            try:
                won.append(policies.change("acme", wanted).version)
            except PolicyConflict as conflict:
                lost.append(conflict.extensions["policy_version"])

    together(write, stores)
    assert sorted(won) == [1, 2, 3, 4, 5]
    assert sorted(lost) == sorted([1, 2, 3, 4, 5] * 3)
    assert versions("acme") == [1, 2, 3, 4, 5]
    assert [event.details["version"] for event in changes()] == [1, 2, 3, 4, 5]


def test_writers_at_once_who_do_not_care(store: Any) -> None:
    """Each change is made after the other, and none is lost."""
    stores = [store() for _ in range(4)]
    start = threading.Barrier(len(stores))

    def write(policies: Policies) -> None:
        number = stores.index(policies)
        start.wait()
        for step in range(5):
            # No two of all these are alike, one after the other.
            policies.change(
                "acme", Change(f"key_{number}", sorted(POLICIES)[step % 3], cast("Detection", DETECTION_MODES[number]))
            )

    together(write, stores)
    assert versions("acme") == list(range(1, 21))
    assert sorted(event.details["version"] for event in changes()) == list(range(1, 21))
    query = sa.select(audit_events.c.details).where(audit_events.c.kind == "policy_changed")
    links = {row.details["version"]: row.details for row in read(query)}
    assert all(links[number]["from"] == links[number - 1]["to"] for number in range(2, 21))


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_each_process_sees_a_change_within_a_second(store: Any) -> None:
    """What it read is believed for a second and no longer; its own changes it knows at once."""
    clock = [100.0]
    near, far = store(clock=lambda: clock[0]), store(clock=lambda: clock[0])
    assert (near.current("acme").version, far.current("acme").version) == (0, 0)
    near.change("acme", Change("cli", "compliance_local_only"))
    assert near.current("acme").version == 1
    clock[0] += 0.99
    assert far.current("acme").version == 0
    clock[0] += 0.02
    assert far.current("acme").policy == "compliance_local_only"


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_few_are_remembered(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many organizations ask, memory has its bound, and each gets its own."""
    monkeypatch.setattr(policies_module, "CACHE_SIZE", 3)
    policies = store(clock=lambda: 100.0)
    policies.change("o7", Change("cli", "compliance_local_only"))
    for number in range(10):
        assert policies.current(f"o{number}").version == (1 if number == 7 else 0)
        assert len(policies._known) <= 3


def versions(organization: str) -> list[int]:
    """Return the numbers of an organization's versions."""
    query = sa.select(table.c.version).where(table.c.organization == organization).order_by(table.c.version)
    return [row.version for row in read(query)]


def together(work: Any, items: list[Any]) -> None:
    """Run `work` on each item, in a thread each."""
    with ThreadPoolExecutor(len(items)) as pool:
        list(pool.map(work, items))


# --- The table ------------------------------------------------------------------------------------

TAMPERING = {
    "update": "UPDATE policies SET policy = 'default_local_first'",
    "delete": "DELETE FROM policies",
    "upsert": "INSERT INTO policies (organization, version, policy, detection, created_at, created_by)"
    " SELECT organization, version, policy, 'off', created_at, created_by FROM policies WHERE true"
    " ON CONFLICT (organization, version) DO UPDATE SET detection = 'off'",
    "replace (sqlite)": "INSERT OR REPLACE INTO policies SELECT * FROM policies",
    "replace by row (sqlite)": "INSERT OR REPLACE INTO policies"
    " (rowid, organization, version, policy, detection, created_at, created_by)"
    " SELECT rowid, 'globex', 9, policy, detection, created_at, created_by FROM policies",
    "truncate (postgresql)": "TRUNCATE policies",
}


def test_the_history_is_not_changed(admin: FlaskClient, database_kind: str) -> None:
    """By no statement: the table is the record of what held when."""
    put(admin, "enterprise", reason="first")
    before = read(sa.select(table))
    database = Database(settings().database)
    try:
        for name, statement in TAMPERING.items():
            if not name.endswith(")") or database_kind in name:
                with pytest.raises(sa.exc.DBAPIError):
                    database.write(lambda on, text=statement: on.exec_driver_sql(text) and None)  # type: ignore[misc]
                assert read(sa.select(table)) == before, name
    finally:
        database.close()
