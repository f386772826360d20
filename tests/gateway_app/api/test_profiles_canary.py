"""Two versions side by side: who gets which, whichever way the request came, and how each of them does."""

from __future__ import annotations

import io
import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from sqlalchemy.engine import Connection

from gateway_app.profiles.canary import gets_canary
from tasks import lifecycle
from tasks.db import Database
from tasks.ids import new_request_id
from tasks.schema import audit_events, profiles
from tasks.settings import settings
from tests.conftest import new_key
from tests.profile_calls import SHIPPED, activate, add, change, connected, create, events, read, recorded, run
from tests.services import wait_until


def canary(client: FlaskClient, version: int, share: float, agent: str = "poet", **fields: Any) -> Any:
    """Run a version beside the active one."""
    return client.put(f"/v1/profiles/{agent}/canary", json={"version": version, "share": share, **fields})


def two_versions(client: FlaskClient, share: float) -> None:
    """Make an agent with a version of each kind."""
    create(client, "poet", activate=True)
    add(client, "poet", "Two.")
    assert canary(client, 2, share).status_code == 200


def sure(request_id: str, share: float) -> int:
    """Return the version that the request must get."""
    return 2 if gets_canary("poet", 2, share, request_id) else 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
def test_shares_are_exact_in_expectation(share: float) -> None:
    """Of many ids as many as the share says, give or take four standard deviations; the same id gets the same."""
    ids = [new_request_id() for _ in range(20_000)]
    took = [gets_canary("poet", 2, share, one) for one in ids]
    assert abs(sum(took) - share * len(ids)) <= 4 * math.sqrt(len(ids) * share * (1 - share))
    assert took == [gets_canary("poet", 2, share, one) for one in ids]


def test_a_larger_share_keeps_those_it_had() -> None:
    """Raising a share moves requests one way only; another canary draws other lots."""
    ids = [new_request_id() for _ in range(2000)]
    few = {one for one in ids if gets_canary("poet", 2, 0.2, one)}
    assert few < {one for one in ids if gets_canary("poet", 2, 0.4, one)}
    assert few != {one for one in ids if gets_canary("poet", 3, 0.2, one)}
    assert few != {one for one in ids if gets_canary("painter", 2, 0.2, one)}


def test_every_record_names_its_version(client: FlaskClient) -> None:
    """Through tasks, chat, responses and batches, each request's record has the version that its id says, and its hash."""
    two_versions(client, 0.5)
    shown = client.get("/v1/profiles/poet").json
    hashes = {entry["version"]: entry["static_profile_hash"] for entry in shown["versions"]}
    # Both are tokenised before the first request comes.
    stored = {row.static_profile_hash for row in read(sa.select(profiles.c.static_profile_hash))}
    assert stored >= set(hashes.values())
    ids = [run(client, "poet").json["id"] for _ in range(12)]
    for _ in range(4):
        asked = {"model": "poet", "messages": [{"role": "user", "content": "x"}], "stream": True}
        with client.post("/v1/chat/completions", json=asked) as answer:
            ids.append(answer.headers["X-Request-Id"])
        made = client.post("/v1/responses", json={"model": "poet", "input": "x", "background": True})
        ids.append(made.headers["X-Request-Id"])
    ids += batch_of(client, 8)
    found = {one: recorded(one) for one in ids}
    for one, (version, static_profile_hash) in found.items():
        assert (version, static_profile_hash) == (sure(one, 0.5), hashes[version])
    assert {version for version, _ in found.values()} == {1, 2}


def batch_of(client: FlaskClient, count: int) -> list[str]:
    """Send a batch, and return the ids of its requests once they are admitted."""
    body = {"model": "poet", "messages": [{"role": "user", "content": "x"}]}
    lines = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(count)]
    content = "\n".join(map(json.dumps, lines)).encode()
    upload = {"purpose": "batch", "file": (io.BytesIO(content), "in.jsonl")}
    file = client.post("/v1/files", data=upload).json["id"]
    asked = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    before = admitted()
    assert client.post("/v1/batches", json=asked).status_code == 200
    wait_until(lambda: len(admitted() - before) == count, 60, "the batch's requests")
    return sorted(admitted() - before)


def admitted() -> set[str]:
    """Return the ids of all requests that were admitted."""
    query = sa.select(audit_events.c.request_id).where(audit_events.c.kind == "admitted")
    return {row.request_id for row in read(query)}


def test_figures(client: FlaskClient) -> None:
    """Outcomes, tokens and the median first token of each version, of requests since the canary began."""
    create(client, "poet", activate=True)
    add(client, "poet", "Two.")
    finish(run(client, "poet").json["id"], "completed", 9999.0)
    canary(client, 2, 0.5)
    create(client, "other", activate=True)
    finish(run(client, "other").json["id"], "completed", 9999.0)
    finish(run(connected(client.application, new_key("other")), SHIPPED).json["id"], "completed", 9999.0)
    ids: dict[int, list[str]] = {1: [], 2: []}
    while min(len(own) for own in ids.values()) < 4:
        one = run(client, "poet").json["id"]
        ids[recorded(one)[0]].append(one)
    counts = {version: len(own) for version, own in ids.items()}
    for own in ids.values():
        for request_id, first_token_ms in zip(own[:3], (30.0, 10.0, 20.0), strict=True):
            finish(request_id, "completed", first_token_ms)
    finish(ids[2][3], "failed", None)
    finish(ids[1][3], "cancelled", 40.0)
    shown = client.get("/v1/profiles/poet/canary").json
    assert (shown["version"], shown["share"]) == (2, 0.5)
    tokens = {"prompt_tokens": 300, "cached_tokens": 150, "output_tokens": 21}
    nothing = dict.fromkeys(("failed", "cancelled", "expired", "dead", "vetoed"), 0)
    assert shown["canary"] == {
        **nothing, **tokens, "version": 2, "requests": counts[2], "completed": 3, "failed": 1, "first_token_ms": 20.0,
    }  # fmt: skip
    cancelled = {"prompt_tokens": 400, "cached_tokens": 200, "output_tokens": 28}
    assert shown["active"] == {
        **nothing, **cancelled, "version": 1, "requests": counts[1], "completed": 3, "cancelled": 1, "first_token_ms": 20.0,
    }  # fmt: skip
    # Another share goes on counting; another version begins anew.
    assert canary(client, 2, 0.6).json["canary"]["completed"] == 3
    add(client, "poet", "Three.")
    assert canary(client, 3, 0.6).json["canary"] == {
        **nothing, **dict.fromkeys(tokens, 0), "version": 3, "requests": 0, "completed": 0, "first_token_ms": None,
    }  # fmt: skip


def finish(request_id: str, state: Any, first_token_ms: float | None) -> None:
    """End a request as a worker does."""
    facts: dict[str, Any] = {
        "prompt_tokens": 100,
        "cached_tokens": 50,
        "output_tokens": 7,
        "first_token_ms": first_token_ms,
    }

    def work(connection: Connection) -> bool:
        attempt = lifecycle.start(connection, request_id, lifecycle.FIRST_EPOCH, "gpu@test", 3)
        assert isinstance(attempt, lifecycle.Attempt)
        return lifecycle.finish(connection, attempt, state, **(facts if first_token_ms is not None else {}))

    database = Database(settings().database)
    try:
        assert database.write(work)
    finally:
        database.close()


def test_stop_and_promote(client: FlaskClient) -> None:
    """Stopped, all get the active version; promoted, all get the one that was on trial."""
    two_versions(client, 1.0)
    states = {entry["version"]: entry["state"] for entry in client.get("/v1/profiles/poet").json["versions"]}
    assert states == {1: "active", 2: "canary"}
    assert recorded(run(client, "poet").json["id"])[0] == 2
    assert change(client, "poet", "canary/stop").json == {"agent": "poet", "canary": None}
    assert recorded(run(client, "poet").json["id"])[0] == 1
    for what in ("canary/stop", "canary/promote"):
        assert change(client, "poet", what).json["code"] == "not_found"
    assert client.get("/v1/profiles/poet/canary").status_code == 404
    canary(client, 2, 0.0)
    assert recorded(run(client, "poet").json["id"])[0] == 1
    since = datetime.fromisoformat(client.get("/v1/profiles/poet").json["canary"]["since"])
    assert datetime.now(UTC) - since < timedelta(minutes=5)
    promoted = change(client, "poet", "canary/promote", reason="Better.").json
    assert (promoted["active_version"], promoted["previous_version"]) == (2, 1)
    assert recorded(run(client, "poet").json["id"])[0] == 2
    shown = client.get("/v1/profiles/poet").json
    assert (shown["canary"], shown["previous_version"]) == (None, 1)
    assert change(client, "poet", "rollback").json["active_version"] == 1


def test_any_other_change_ends_it(client: FlaskClient) -> None:
    """Whoever activates, rolls back or retires decides about all requests."""
    two_versions(client, 1.0)
    add(client, "poet", "Three.")
    ending: list[tuple[str, dict[str, Any]]] = [("activate", {"version": 3}), ("rollback", {}), ("retire", {})]
    for what, fields in ending:
        if client.get("/v1/profiles/poet").json["canary"] is None:
            assert canary(client, 2, 1.0).status_code == 200
        assert change(client, "poet", what, **fields).status_code == 200
        assert client.get("/v1/profiles/poet").json["canary"] is None
        assert events()[-1].details["canary_ended"] == 2


def test_what_cannot_be_a_canary(client: FlaskClient) -> None:
    """Nothing beside nothing, nothing beside itself, and nothing that could not be active."""
    create(client, "poet")
    assert canary(client, 1, 0.5).json["code"] == "not_found"
    activate(client, "poet", 1)
    assert canary(client, 1, 0.5).json["code"] == "not_found"
    assert canary(client, 7, 0.5).json["code"] == "not_found"
    add(client, "poet", "word " * 1900)
    assert canary(client, 2, 0.5).json["code"] == "profile_unusable"
    assert canary(client, 1, 0.5, agent="nobody").json["code"] == "unknown_agent"
    assert client.get("/v1/profiles/poet").json["canary"] is None


def test_the_file_and_an_own_version(client: FlaskClient) -> None:
    """Either can be on trial beside the other."""
    add(client, SHIPPED, "Two.")
    assert canary(client, 2, 1.0, agent=SHIPPED).json["active"]["version"] == 1
    assert recorded(run(client, SHIPPED).json["id"])[0] == 2
    change(client, SHIPPED, "canary/promote")
    assert canary(client, 1, 1.0, agent=SHIPPED).json["version"] == 1
    assert recorded(run(client, SHIPPED).json["id"])[0] == 1
    shown = client.get(f"/v1/profiles/{SHIPPED}").json
    assert [(entry["source"], entry["state"]) for entry in shown["versions"]] == [("api", "active"), ("file", "canary")]
    assert change(client, SHIPPED, "canary/promote").json["active_version"] == 1
    assert client.get(f"/v1/profiles/{SHIPPED}").json["source"] == "file"
