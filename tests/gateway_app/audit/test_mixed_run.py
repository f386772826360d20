"""The trail of a run in which everything happens, read by another reader: it counts what SQL counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from flask.testing import FlaskClient

from gateway_app.audit.cli import audit
from tasks import lifecycle
from tasks.db import Database
from tasks.lifecycle import Refusal
from tasks.settings import settings
from tests.conftest import new_key
from tests.gateway_app.audit.recording import VETO, opened
from tests.played_worker import TASK, PlayedWorker, result

SECRET = "canary-7f12-the-vault-code-is-4711"
#: What each type of event must say of itself, by MetaQore's contract.
DECISION_KEYS = {"agent_name", "task_type", "sensitivity", "provider", "policy", "reason"}
VETO_KEYS = {"veto", "agent_name", "task_type", "sensitivity", "provider"}
VETO_OBJECT = {"reason": str, "policy_violated": str, "severity": str, "details": dict}
SENSITIVITIES = {"public", "internal", "sensitive", "critical"}
POLICIES = {"default_local_first", "enterprise_residency", "compliance_local_only"}
#: What SQL calls what the trail has its own names for.
TYPES = {"admitted": "routing_decision", "vetoed": "veto"}


@dataclass(frozen=True)
class Trail:
    """A reader of `compliance_audit_<organization>.jsonl`, written from the contract and from nothing else."""

    events: list[dict[str, Any]]

    @classmethod
    def read(cls, content: bytes, organization: str) -> Trail:
        """Read a file. Fails unless each line is an event."""
        assert content == b"" or content.endswith(b"\n")
        events = [json.loads(line, parse_constant=pytest.fail) for line in content.split(b"\n")[:-1]]
        for event in events:
            assert set(event) == {"timestamp", "event_type", "organization", "payload"}
            moment = datetime.fromisoformat(event["timestamp"])
            assert moment.utcoffset() == timedelta(0)
            assert event["timestamp"] == moment.astimezone(UTC).isoformat(timespec="microseconds")
            assert event["organization"] == organization
            assert isinstance(event["event_type"], str)
            assert isinstance(event["payload"], dict)
            cls._check(event["event_type"], event["payload"])
        return cls(events)

    @staticmethod
    def _check(event_type: str, payload: Mapping[str, Any]) -> None:
        if event_type == "routing_decision":
            assert set(payload) >= DECISION_KEYS
            assert payload["reason"] in ("allowed", "auto_recommendation")
            assert payload["policy"] in POLICIES
        if event_type == "veto":
            assert set(payload) >= VETO_KEYS
            assert {name: type(value) for name, value in payload["veto"].items()} == VETO_OBJECT
            assert payload["veto"]["severity"] in ("low", "medium", "high", "critical")
            assert payload["veto"]["policy_violated"] in POLICIES
        if event_type in ("routing_decision", "veto"):
            assert payload["sensitivity"] in SENSITIVITIES
            assert all(isinstance(payload[name], str) for name in ("agent_name", "task_type", "provider"))

    def by_type(self) -> Counter[str]:
        """Count as MetaQore's report does."""
        return Counter(event["event_type"] for event in self.events)

    def by_provider(self) -> Counter[str]:
        """Count as MetaQore's report does."""
        return Counter(event["payload"]["provider"] for event in self.events if event["payload"].get("provider"))

    def by_policy_violated(self) -> Counter[str]:
        """Count as MetaQore's report does."""
        return Counter(
            event["payload"]["veto"]["policy_violated"] for event in self.events if event["event_type"] == "veto"
        )

    def where(self, **wanted: Any) -> list[dict[str, Any]]:
        """Filter as MetaQore does: by a key of the event, or one of its payload."""
        return [
            event
            for event in self.events
            if all(event.get(name, event["payload"].get(name)) == value for name, value in wanted.items())
        ]


@pytest.fixture
def record(client: FlaskClient) -> Iterator[Database]:
    """Return the gateway's record."""
    with opened(settings().database.url) as made:
        yield made


@pytest.fixture
def run(client: FlaskClient, record: Database) -> dict[str, int]:
    """Have everything happen; return how many requests each organization sent."""
    sent: Counter[str] = Counter()

    def post(key: str, status: int, organization: str = "default", **changes: Any) -> str:
        answer = client.post("/v1/tasks", json={**TASK, "directive": SECRET, **changes}, headers=bearer(key))
        assert answer.status_code == status, answer.text
        sent[organization] += 1
        body: dict[str, Any] = answer.get_json()
        request_id: str = body["id"] if status == 202 else body["request_id"]
        return request_id

    admin, other = new_key("default", role="admin"), new_key("other")

    def put(policy: str) -> None:
        body = {"policy": policy, "reason": "=for the mixed run"}
        assert client.put("/v1/policy", json=body, headers={**bearer(admin), "If-Match": "*"}).status_code == 200

    with closing(PlayedWorker(client)) as worker:
        done, broken, late = (post(admin, 202, project_id="proj_0123456789ab") for _ in range(3))
        worker.answer(done, worker.start(done), result("Fine", "."))
        worker.fail(worker.start(broken))
        refusal = Refusal("vetoed", "policy_veto", {**columns_of(record, late), "details": {"veto": VETO}})
        record.write(lambda connection: lifecycle.start(connection, late, 1, "worker", 3, refusal))
        assert client.delete(f"/v1/tasks/{post(admin, 202)}", headers=bearer(admin)).status_code == 200
    # Each policy refuses something of its own.
    post(admin, 403, provider_hint="openrouter", has_sensitive_data=True)
    post(admin, 403, provider_hint="ollama")
    put("enterprise")
    post(admin, 403, provider_hint="openrouter", task_type="Planning")
    post(admin, 202, provider_hint="hmcp_gateway")
    put("compliance-local-only")
    post(admin, 403, provider_hint="openrouter")
    # Refused before, and after, something was decided.
    post(admin, 422, directive=7)
    post(admin, 404, agent="nobody")
    post(other, 202, organization="other", is_security_task=True, has_sensitive_data=True)
    post(other, 403, organization="other", provider_hint="openrouter", is_security_task=True)
    return dict(sent)


def bearer(key: str) -> dict[str, str]:
    """Return what authenticates a request."""
    return {"Authorization": f"Bearer {key}"}


def columns_of(record: Database, request_id: str) -> dict[str, Any]:
    """Return what was decided of a request."""
    query = sa.text(
        "SELECT task_type, sensitivity, provider, policy, project_id FROM audit_events"
        " WHERE request_id = :id AND kind = 'admitted'"
    )
    return dict(record.read(lambda connection: connection.execute(query, {"id": request_id}).mappings().one()))


def counted(record: Database, what: str, organization: str, condition: str = "1 = 1") -> Counter[str]:
    """Count events in SQL, by an expression that differs between the two databases where it concerns JSON."""

    def work(connection: sa.Connection) -> Counter[str]:
        expression = what
        if what == "violated":
            sqlite = connection.dialect.name == "sqlite"
            expression = (
                "json_extract(details, '$.veto.policy_violated')" if sqlite else "details->'veto'->>'policy_violated'"
            )
        query = sa.text(
            f"SELECT {expression} AS what, COUNT(*) FROM audit_events "
            f"WHERE organization = :organization AND {condition} GROUP BY what"
        )
        return Counter({row[0]: row[1] for row in connection.execute(query, {"organization": organization})})

    return record.read(work)


def test_the_trail_counts_what_sql_counts(
    client: FlaskClient, record: Database, run: dict[str, int], tmp_path: Path
) -> None:
    """By type, by provider and by violated policy; for each organization, whichever way it was exported."""
    for organization in ("default", "other"):
        content = client.get("/v1/audit/export", headers=bearer(new_key(organization))).data
        assert SECRET.encode() not in content
        trail = Trail.read(content, organization)
        kinds = counted(record, "kind", organization)
        assert trail.by_type() == Counter({TYPES.get(kind, kind): number for kind, number in kinds.items()})
        assert trail.by_provider() == counted(record, "provider", organization, "provider IS NOT NULL")
        assert trail.by_policy_violated() == counted(record, "violated", organization, "kind = 'vetoed'")
        assert trail.by_type()["received"] == run[organization]
        directory = tmp_path / organization
        directory.mkdir()
        files = {"output": str(tmp_path / f"{organization}.jsonl"), "follow": str(directory)}
        for arguments in (
            ["export", "--organization", organization, "--output", files["output"]],
            ["follow", "--organization", organization, "--directory", files["follow"], "--once"],
        ):
            done = CliRunner().invoke(audit, arguments)
            assert done.exit_code == 0, done.output
        assert Path(files["output"]).read_bytes() == content
        followed = (directory / f"compliance_audit_{organization}.jsonl").read_bytes()
        assert sorted(followed.splitlines()) == sorted(content.splitlines())


def test_what_is_in_the_trail(client: FlaskClient, run: dict[str, int]) -> None:
    """Every request that was routed or vetoed says so, and the run was as mixed as it should be."""
    trail = Trail.read(client.get("/v1/audit/export").data, "default")
    assert trail.by_type() == {
        "received": run["default"],
        "routing_decision": 5,
        "veto": 5,
        "started": 2,
        "completed": 1,
        "failed": 3,
        "cancelled": 1,
        "policy_changed": 2,
    }
    assert trail.by_policy_violated() == {
        "default_local_first": 3,
        "enterprise_residency": 1,
        "compliance_local_only": 1,
    }
    assert trail.by_provider() == {"hmcp_gateway": 7, "openrouter": 3, "ollama": 1}
    decided = {
        event["payload"]["request_id"]
        for kind in ("routing_decision", "veto")
        for event in trail.where(event_type=kind)
    }
    undecided = {event["payload"]["request_id"] for event in trail.where(event_type="received")} - decided
    refused = {event["payload"]["request_id"]: event["payload"]["code"] for event in trail.where(event_type="failed")}
    assert sorted(refused[request_id] for request_id in undecided) == ["invalid_request", "unknown_agent"]
    # Nothing was decided of the one; the other was refused for another reason, and its event says what was decided.
    (early,), (unknown,) = trail.where(code="invalid_request"), trail.where(code="unknown_agent")
    assert not DECISION_KEYS & set(early["payload"])
    assert set(unknown["payload"]) >= DECISION_KEYS
    # One that was refused when it left the queue has both.
    (both,) = trail.where(event_type="veto", attempt=0, project_id="proj_0123456789ab")
    assert len(trail.where(event_type="routing_decision", request_id=both["payload"]["request_id"])) == 1
    assert len(trail.where(provider="ollama", organization="default")) == 1
    for change in trail.where(event_type="policy_changed"):
        assert change["payload"]["change"]["reason"] == "=for the mixed run"


def test_the_table_counts_the_same(client: FlaskClient, run: dict[str, int]) -> None:
    """CSV has a row for each line."""
    lines = client.get("/v1/audit/export").data.count(b"\n")
    table = client.get("/v1/audit/export", query_string={"format": "csv"}).data
    assert table.count(b"\r\n") == lines + 1
    assert SECRET.encode() not in table
