"""What governance does with a task: in which order, by whose policy, and what it leaves for the record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app import build
from gateway_app.governance.interceptor import Decision, GovernanceInterceptor
from tasks.db import Database
from tasks.errors import ConfigurationError, DatabaseUnavailable, PolicyVeto, ProjectUnverified, Unsupported
from tasks.governance.decision import Found
from tasks.governance.policies import Change, Policies, PolicyVersion
from tasks.governance.psmp import Standing
from tasks.governance.secure_gateway import PROVIDERS, Veto
from tasks.job import TaskRequest
from tasks.schema import audit_events
from tasks.settings import PREFIX, DatabaseGroup, settings
from tests.conftest import new_key

TASK = TaskRequest(messages=({"role": "user", "content": "hello"},), project_id="proj_0123456789ab")
NOTHING = Found({}, private=False, sensitive=False)
EMAIL = Found({"email": 1}, private=True, sensitive=False)
BLOCKED = Veto("Project is blocked", "psmp_project_blocked", "high", {"mode": "strict"})


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return which it is: nothing here depends on it."""
    kind: str = request.param
    return kind


class Projects:
    """Answers with what a test says, and counts who asks."""

    def __init__(self, standing: Standing | None) -> None:
        self.answer = standing
        self.asked: list[dict[str, Any]] = []

    def standing(self, **named: Any) -> Standing | None:
        self.asked.append(named)
        return self.answer

    def close(self) -> None:
        """Have nothing to close."""


class Interceptor:
    """An interceptor with all that it asks in a test's hands."""

    def __init__(self, policies: Policies) -> None:
        self.policies = policies
        self.found = NOTHING
        self.scanned = 0
        self.projects = Projects(None)

    def decide(self, task: TaskRequest = TASK, *, up: tuple[str, ...] = PROVIDERS, **fields: Any) -> Decision:
        """Decide about a task of the organization `acme`."""
        governance = GovernanceInterceptor(self.policies, up, self._scan, self.projects)
        return governance.decide("acme", task.model_copy(update=fields), "coder")

    def _scan(self, _task: TaskRequest) -> Found:
        self.scanned += 1
        return self.found


@pytest.fixture
def interceptor(migrated_url: str) -> Iterator[Interceptor]:
    """Return an interceptor on an empty database, whose default policy records what is detected."""
    database = Database(DatabaseGroup(url=migrated_url))
    yield Interceptor(Policies(database, PolicyVersion(0, "default_local_first", "record")))
    database.close()


def test_detection_modes(interceptor: Interceptor) -> None:
    """Off looks for nothing; record changes nothing but the record; raise and refuse decide by it."""
    interceptor.found = EMAIL
    recorded = interceptor.decide()
    assert (recorded.columns["sensitivity"], recorded.veto) == ("public", None)
    assert recorded.columns["details"] == {
        "flags": {"private": False, "sensitive": False, "security": False},
        "policy_version": 0,
        "detection": "record",
        "detected": {"email": 1},
        "detected_flags": {"private": True, "sensitive": False},
    }
    interceptor.policies.change("acme", Change("cli", "default_local_first", "raise"))
    raised = interceptor.decide()
    assert (raised.columns["sensitivity"], raised.veto) == ("sensitive", None)
    # What the caller said stays what the caller said.
    assert raised.columns["details"]["flags"]["private"] is False
    assert raised.columns["details"]["policy_version"] == 1
    interceptor.policies.change("acme", Change("cli", "default_local_first", "refuse"))
    refused = interceptor.decide()
    assert refused.columns["reason"] == "Detected email, which this organization refuses"
    assert refused.columns["details"]["vetoed_by"] == "detection"
    with pytest.raises(PolicyVeto):
        refused.enforce()
    assert interceptor.scanned == 3
    interceptor.policies.change("acme", Change("cli", "default_local_first", "off"))
    assert interceptor.decide().columns["details"]["detection"] == "off"
    assert interceptor.scanned == 3


def test_a_projects_veto(interceptor: Interceptor) -> None:
    """It refuses what the policy allows, and the record has what was known of the project."""
    interceptor.projects.answer = Standing({"status": "blocked"}, BLOCKED)
    decision = interceptor.decide(artifact_id="art_0123456789ab", task_id="task_0123456789ab")
    assert interceptor.projects.asked == [
        {
            "project_id": "proj_0123456789ab",
            "artifact_id": "art_0123456789ab",
            "task_id": "task_0123456789ab",
            "agent_name": "coder",
        }
    ]
    held = decision.columns["details"]
    assert (held["psmp"], held["vetoed_by"]) == ({"status": "blocked"}, "project")
    assert held["veto"] == BLOCKED.as_dict()
    assert decision.columns["reason"] == "Project is blocked"
    with pytest.raises(PolicyVeto) as caught:
        decision.enforce()
    assert caught.value.extensions["veto"] == BLOCKED.as_dict()
    assert type(caught.value) is PolicyVeto


def test_a_project_that_nobody_can_tell_of(interceptor: Interceptor) -> None:
    """Its caller is told to come back, with the same veto in the record."""
    interceptor.projects.answer = Standing({}, replace(BLOCKED, reason="MetaQore cannot be reached"), retryable=True)
    with pytest.raises(ProjectUnverified) as caught:
        interceptor.decide().enforce()
    assert (caught.value.status, caught.value.retryable, caught.value.retry_after_s) == (503, True, 5)


def test_a_project_that_is_well(interceptor: Interceptor) -> None:
    """What was known of it is recorded; a request that names none is not asked about."""
    interceptor.projects.answer = Standing({"status": "in_progress"})
    decision = interceptor.decide()
    decision.enforce()
    assert decision.columns["details"]["psmp"] == {"status": "in_progress"}
    interceptor.projects.answer = None
    assert "psmp" not in interceptor.decide(project_id=None).columns["details"]


def test_nobody_is_asked_about_what_is_refused_already(interceptor: Interceptor) -> None:
    """A caller whom the policy refuses costs MetaQore nothing."""
    assert interceptor.decide(provider_hint="openrouter", has_sensitive_data=True).veto is not None
    assert interceptor.projects.asked == []


@pytest.mark.parametrize("provider", ["ollama", "openrouter"])
def test_a_provider_that_is_up_and_not_run_here(interceptor: Interceptor, provider: str) -> None:
    """The policy allows it, the record says so, and nothing pretends to have run there."""
    decision = interceptor.decide(provider_hint=provider)
    assert (decision.veto, decision.columns["provider"], decision.columns["reason"]) == (None, provider, "allowed")
    with pytest.raises(Unsupported):
        decision.enforce()
    with pytest.raises(Unsupported):
        interceptor.decide(up=(provider,)).enforce()


def test_a_database_that_is_away() -> None:
    """Nothing is decided by a policy that cannot be read."""
    database = Database(DatabaseGroup(url="sqlite:////proc/nowhere.db", timeout_s=0.2))
    try:
        policies = Policies(database, PolicyVersion(0, "default_local_first", "off"))
        with pytest.raises(DatabaseUnavailable):
            GovernanceInterceptor(policies, PROVIDERS, lambda _task: NOTHING, None).decide("acme", TASK, "coder")
    finally:
        database.close()


def test_an_unknown_policy_in_the_settings(configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops the start, and so does a provider that there is none of."""
    for name, value in (("POLICY", "lenient"), ("PROVIDERS", '["nowhere"]'), ("DETECTION", "maybe")):
        with monkeypatch.context() as patched:
            patched.setenv(f"{PREFIX}GOVERNANCE__{name}", value)
            settings.cache_clear()
            with pytest.raises(ConfigurationError, match=f"governance.{name.lower()}"):
                build(settings())
        settings.cache_clear()


# --- Through HTTP ---------------------------------------------------------------------------------

SECRET = "jo.bloggs@example.org"


def test_what_detection_finds_through_every_api(client: FlaskClient, tmp_path: Path) -> None:
    """A directive, a context's value, a message of a chat, an input of a response: counted, raised, refused; never kept."""
    admin = client.application.test_client()
    admin.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default', 'admin')}"
    agent, model = {"agent": "incident-responder"}, {"model": "incident-responder"}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/tasks", {**agent, "directive": f"Write to {SECRET}."}),
        ("/v1/tasks", {**agent, "directive": "Write.", "context": {"to": [{"address": SECRET}]}}),
        ("/v1/responses", {**model, "background": True, "store": True, "input": f"Write to {SECRET}."}),
    ]
    for mode, status, sensitivity in (("record", (200, 202), "public"), ("raise", (200, 202), "sensitive")):
        admin.put("/v1/policy", json={"policy": "default", "detection": mode}, headers={"If-Match": "*"})
        for path, body in asked:
            answer = client.post(path, json=body)
            assert answer.status_code in status, answer.text
            row = newest("admitted")
            assert (row.sensitivity, row.details["detected"]) == (sensitivity, {"email": 1})
            assert row.details["detected_flags"] == {"private": True, "sensitive": False}
    admin.put("/v1/policy", json={"policy": "default", "detection": "refuse"}, headers={"If-Match": "*"})
    asked.append(("/v1/chat/completions", {**model, "messages": [{"role": "user", "content": SECRET}]}))
    for path, body in asked:
        answer = client.post(path, json=body)
        assert answer.status_code == 403, answer.text
        error = (answer.json or {}).get("error", answer.json)
        assert (error["code"], error["veto"]["severity"]) == ("policy_veto", "high")
        assert SECRET not in answer.text
        row = newest("vetoed")
        assert row.details["veto"] == error["veto"]
        assert row.details["detected"] == {"email": 1}
    content = b"".join(path.read_bytes() for path in tmp_path.glob("gateway.db*"))
    assert content
    assert SECRET.encode() not in content


def newest(kind: str) -> Any:
    """Return the newest event of a kind."""
    database = Database(settings().database)
    try:
        query = sa.select(audit_events).where(audit_events.c.kind == kind).order_by(audit_events.c.request_id.desc())
        return database.read(lambda connection: connection.execute(query.limit(1)).one())
    finally:
        database.close()
