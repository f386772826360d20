"""All inputs of MetaQore's SecureGateway, through HTTP, against an oracle that knows only the contract's text.

The policy is set through the API under every spelling of its names; tasks go through `POST /v1/tasks` with every
combination of flags and provider, for agents and task types in many scripts and cases. Each answer, and each request's
audit event, must say what the oracle says.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app import build
from tasks.db import Database
from tasks.schema import audit_events
from tasks.settings import settings
from tests.conforming import watched
from tests.conftest import new_key
from tests.secure_gateway_oracle import AGENTS, CLOUD, POLICIES, PRIORITY, TASK_TYPES, Case, Ruled, oracle

HINTS = (None, *PRIORITY, "elsewhere", "OLLAMA")
FLAGS = list(itertools.product((False, True), repeat=3))


class Gateway:
    """A gateway with these providers up, its clients, and what was sent to it."""

    def __init__(self, client: FlaskClient, database: Database, admin: str, up: tuple[str, ...]) -> None:
        self._client, self._database, self._admin, self.up = client, database, admin, up
        self._version = 0
        self._policy = ""
        self._sent: dict[str, tuple[Case, str, int, Any]] = {}

    def put(self, name: str) -> Any:
        """Put a policy into force, by any of its names."""
        headers = {"Authorization": f"Bearer {self._admin}", "If-Match": "*"}
        return self._client.put("/v1/policy", json={"policy": name, "reason": "a test"}, headers=headers)

    def choose(self, name: str, policy: str) -> None:
        """Put a policy into force, and see that it is the one with this full name."""
        answer = self.put(name)
        assert answer.status_code == 200, answer.json
        assert answer.json["policy"] == policy, name
        self._policy, self._version = policy, answer.json["version"]

    def send(self, case: Case) -> None:
        """Submit a task, and hold the answer against the oracle."""
        answer = self._client.post("/v1/tasks", json=case.body())
        ruled = oracle(case, self._policy, self.up)
        if ruled.refused is not None:
            assert answer.status_code == 403, (case, answer.json)
            assert answer.json["code"] == "policy_veto"
            assert answer.json["veto"] == self._veto(ruled, self._policy), case
        elif ruled.provider == "hmcp_gateway":
            assert answer.status_code == 202, (case, answer.json)
            assert (answer.json["sensitivity"], answer.json["provider"]) == (ruled.sensitivity, ruled.provider), case
        else:
            # The policy allows it, but this gateway sends nothing to others; it says so instead of running it itself.
            assert (answer.status_code, answer.json["code"]) == (422, "unsupported"), (case, answer.json)
        request_id = answer.json["id"] if answer.status_code == 202 else answer.json["request_id"]
        self._sent[request_id] = (case, self._policy, self._version, answer.status_code)

    def check_record(self) -> None:
        """See that the audit says of each request what its caller was told, and what the oracle says."""
        kinds = {202: "admitted", 403: "vetoed", 422: "failed"}
        query = sa.select(audit_events).where(audit_events.c.kind.in_(kinds.values()))
        events = {
            row.request_id: row for row in self._database.read(lambda connection: connection.execute(query).all())
        }
        assert set(events) == set(self._sent)
        for request_id, (case, policy, version, status) in self._sent.items():
            event, ruled = events[request_id], oracle(case, policy, self.up)
            assert event.kind == kinds[status]
            assert (event.agent_name, event.task_type) == (case.agent, case.task_type)
            assert (event.sensitivity, event.provider, event.policy) == (ruled.sensitivity, ruled.provider, policy), (
                case
            )
            assert event.reason == (ruled.refused or ruled.reason), case
            assert event.details["flags"] == {
                "private": case.private,
                "sensitive": case.sensitive,
                "security": case.security,
            }
            assert event.details["policy_version"] == version
            assert event.details.get("veto") == (None if ruled.refused is None else self._veto(ruled, policy))

    @staticmethod
    def _veto(ruled: Ruled, policy: str) -> dict[str, Any]:
        return {
            "reason": ruled.refused,
            "policy_violated": policy,
            "severity": "critical",
            "details": {"policy": policy},
        }


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return the one kind of database that is enough here."""
    kind: str = request.param
    return kind


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """Return a folder with a small profile for each agent."""
    folder = tmp_path / "profiles"
    folder.mkdir()
    for number, agent in enumerate(AGENTS):
        segments = [{"kind": "agent_base_profile", "text": "Be brief."}]
        # JSON is YAML, too.
        content = json.dumps({"agent": agent, "version": 1, "description": "A test's agent.", "segments": segments})
        (folder / f"{number}.yaml").write_text(content, "utf-8")
    return folder


@pytest.fixture
def gateway(
    configured: None, profiles: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Gateway]:
    """Return a gateway. The test's parameter says which providers are up."""
    up: tuple[str, ...] = request.param
    monkeypatch.setenv("METAQORE_GOVERNANCE__PROFILES_DIRECTORY", str(profiles))
    monkeypatch.setenv("METAQORE_GOVERNANCE__PROVIDERS", json.dumps(up))
    settings.cache_clear()
    faults: list[str] = []
    app = watched(build(settings()), faults)
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
    database = Database(settings().database)
    with app.extensions["closing"]:
        yield Gateway(client, database, new_key("default", role="admin"), up)
    database.close()
    assert not faults, faults


ONLY_OURS, ALL_UP, NONE_UP, OTHERS_UP = ("hmcp_gateway",), PRIORITY, (), (CLOUD, "ollama")


@pytest.mark.parametrize("gateway", [ONLY_OURS], indirect=True)
def test_every_spelling_of_a_policys_name(gateway: Gateway) -> None:
    """Space around, case, and `-` for `_`; each is shown to be that policy by tasks that tell the three apart."""
    for policy, aliases in POLICIES.items():
        for name in (policy, *aliases):
            spellings = {
                name,
                name.upper(),
                name.title(),
                name.replace("_", "-"),
                f"  {name}\t",
                f"\n{name.swapcase()} ",
            }
            if "_" in name:
                spellings |= {name.replace("_", "-").upper(), name.replace("_", "-", 1)}
            for spelling in sorted(spellings):
                gateway.choose(spelling, policy)
                gateway.send(Case(hint=CLOUD))
                gateway.send(Case(hint=CLOUD, task_type="plan"))
    gateway.check_record()


@pytest.mark.parametrize("gateway", [ONLY_OURS], indirect=True)
def test_a_name_that_is_none_changes_nothing(gateway: Gateway) -> None:
    """The answer lists those there are, and repeats nothing."""
    gateway.choose("enterprise", "enterprise_residency")
    odd = (
        "lenient",
        "default local first",
        "default__local_first",
        "enterprıse",
        "ENTERPRİSE",
        "ｄｅｆａｕｌｔ",
        "default\u200b",
        "–",
        " ",
    )
    for name in odd:
        answer = gateway.put(name)
        assert (answer.status_code, answer.json["code"]) == (422, "unknown_policy"), name
        assert all(policy in answer.text for policy in POLICIES)
        assert name.strip() not in answer.text.replace("default_local_first", "") or name == " "
        gateway.send(Case(hint=CLOUD, task_type="plan"))
    gateway.check_record()


@pytest.mark.parametrize("gateway", [ONLY_OURS, ALL_UP, NONE_UP, OTHERS_UP], indirect=True)
def test_all_flags_and_providers_under_all_policies(gateway: Gateway) -> None:
    """For an agent and a task that mean nothing, and for each kind of name that does, whichever providers are up.

    What is allowed is refused while it is down; of those that are allowed and up the contract's first is recommended,
    whatever order the setting has.
    """
    names = [("coder", "task"), ("coder", "ESTATE"), ("VaLiDaToR-7", "chat"), ("contract-validator", "plan")]
    names = names if gateway.up == ONLY_OURS else names[:2]
    for policy in POLICIES:
        gateway.choose(policy, policy)
        for (agent, task_type), (private, sensitive, security), hint in itertools.product(names, FLAGS, HINTS):
            gateway.send(Case(agent, task_type, private, sensitive, security, hint))
    gateway.check_record()


@pytest.mark.parametrize("gateway", [ONLY_OURS], indirect=True)
def test_names_in_every_case_and_script(gateway: Gateway) -> None:
    """MetaQore is a Python program: what `str.lower` makes of a name decides, and the tables here say what that is."""
    assert all(("validator" in name.lower()) == found for name, found in AGENTS.items())
    words = ("plan", "state", "governance")
    assert all(any(word in name.lower() for word in words) == found for name, found in TASK_TYPES.items())
    for policy in POLICIES:
        gateway.choose(policy, policy)
        # Of the three this one alone tells internal tasks from both other kinds.
        thorough = policy == "enterprise_residency"
        for security, hint in itertools.product((False, True), (None, CLOUD)) if thorough else [(False, CLOUD)]:
            for agent in AGENTS:
                gateway.send(Case(agent, security=security, hint=hint))
            for task_type in TASK_TYPES:
                gateway.send(Case("coder", task_type, security=security, hint=hint))
    gateway.check_record()
