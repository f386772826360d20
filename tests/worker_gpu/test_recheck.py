"""A request that was allowed when it was queued, and is not any more when its turn comes, never reaches the engine.

What is refused ends once, in the record, for whoever watches and for whoever asks; what still holds runs on.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import sqlalchemy as sa
from flask.testing import FlaskClient
from sqlalchemy.engine import Connection

from tasks import lifecycle
from tasks.audit.events import Subject
from tasks.db import Database, now
from tasks.db_statements import Statement
from tasks.errors import DatabaseUnavailable
from tasks.governance.decision import Detection, Facts, Found, details
from tasks.governance.policies import Change, Policies, PolicyVersion
from tasks.governance.psmp import Standing
from tasks.governance.recheck import Recheck
from tasks.governance.secure_gateway import Veto
from tasks.ids import new_request_id
from tasks.lifecycle import NotStarted, Refusal
from tasks.schema import TERMINAL_KINDS, TERMINAL_STATES, api_keys, audit_events
from tasks.settings import DatabaseGroup, settings
from tests.conftest import new_key
from tests.services import wait_until
from tests.worker_gpu.scripted import Message, endless, three_words, with_worker
from tests.worker_gpu.scripted import Worker as ScriptedWorker
from tests.workers import Worker

DEFAULT = PolicyVersion(0, "default_local_first", "record")
BLOCKED = Veto("Project is blocked", "psmp_project_blocked", "high", {"mode": "strict"})
EMAIL = Found({"email": 1}, private=True, sensitive=False)
SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


class Projects:
    """Says of a project what a test wants, and counts who asks."""

    def __init__(self, database: Database) -> None:
        self.answer: Standing | None = None
        self.asked: list[str | None] = []
        self._database = database

    def standing(self, *, project_id: str | None, **_named: Any) -> Standing | None:
        self.asked.append(project_id)
        # Nobody holds a transaction meanwhile: another may write.
        self._database.write(lambda connection: connection.execute(sa.text("SELECT 1")) and None)
        return self.answer

    def close(self) -> None:
        """Have nothing to close."""


@dataclass
class Queue:
    """Requests that wait, and what looks at them again."""

    database: Database
    policies: Policies
    projects: Projects
    recheck: Recheck

    def admit(self, facts: Facts | None = None, detection: Detection = "record", **columns: Any) -> str:
        """Record a request as admitted under version 0; return its id."""
        subject = Subject(new_request_id(), "acme", "key_1", "coder")
        facts = facts or Facts("coder", "chat")
        decision = {
            "task_type": facts.task_type,
            "sensitivity": "public",
            "provider": "hmcp_gateway",
            "policy": "default_local_first",
            "details": details(facts, detection, 0),
            **columns,
        }
        stored = {"api": "tasks", "priority": "normal", "deadline": None}
        admission = lifecycle.Admission(subject, decision, "ab" * 32, b"wrapped", b"payload", stored)
        self.database.write(lambda connection: lifecycle.admit(connection, admission))
        return subject.request_id

    def look(self, request_id: str) -> Refusal | None:
        """Look at a request again."""
        return self.recheck.refusal(request_id)

    def revoke(self) -> None:
        """Revoke the key that sends all requests."""
        self.database.write(
            lambda connection: connection.execute(sa.update(api_keys).values(revoked_at=now())) and None
        )


@pytest.fixture
def queue(migrated_url: str) -> Iterator[Queue]:
    """Return an empty queue whose organization has one key, and no policy of its own."""
    database = Database(DatabaseGroup(url=migrated_url))
    key = {"key_id": "key_1", "organization": "acme", "name": "test", "key_hash": b"x" * 32, "created_at": now()}
    database.write(lambda connection: connection.execute(sa.insert(api_keys), key) and None)
    projects = Projects(database)
    yield Queue(database, Policies(database, DEFAULT), projects, Recheck(database, DEFAULT, projects))
    database.close()


# --- What is found --------------------------------------------------------------------------------


def test_what_still_holds(queue: Queue) -> None:
    """Nothing changed, or what changed allows it as well."""
    request_id = queue.admit(project_id="proj_0123456789ab")
    assert queue.look(request_id) is None
    queue.policies.change("acme", Change("cli", "compliance_local_only", "refuse"))
    queue.policies.change("globex", Change("cli", "default_local_first", "refuse"))
    queue.projects.answer = Standing({"status": "in_progress"})
    assert queue.look(request_id) is None
    assert queue.projects.asked == ["proj_0123456789ab"] * 2


def test_a_revoked_key(queue: Queue) -> None:
    """Whatever else is true: who may not ask any more gets no answer. So it is with a key that is gone."""
    request_id = queue.admit()
    queue.revoke()
    assert queue.look(request_id) == Refusal("failed", "key_revoked", {})
    queue.database.write(lambda connection: connection.execute(sa.delete(api_keys)) and None)
    assert queue.look(request_id) == Refusal("failed", "key_revoked", {})


def test_a_policy_that_forbids_it_now(queue: Queue) -> None:
    """Decided again from the recorded facts, under the newest version; the veto is as the gateway would have made it."""
    request_id = queue.admit(Facts("coder", "chat", provider_hint="openrouter"), provider="openrouter")
    queue.policies.change("acme", Change("cli", "enterprise_residency"))
    assert queue.look(request_id) is None
    queue.policies.change("acme", Change("cli", "compliance_local_only"))
    refusal = queue.look(request_id)
    assert refusal is not None
    assert (refusal.kind, refusal.code) == ("vetoed", "policy_veto")
    facts = dict(refusal.facts)
    held = facts.pop("details")
    assert facts == {
        "task_type": "chat",
        "sensitivity": "public",
        "provider": "openrouter",
        "policy": "compliance_local_only",
        "reason": "Provider 'openrouter' disallowed for public tasks",
        "project_id": None,
        "artifact_id": None,
        "task_id": None,
    }
    assert (held["policy_version"], held["vetoed_by"]) == (2, "policy")
    assert held["veto"] == {
        "reason": "Provider 'openrouter' disallowed for public tasks",
        "policy_violated": "compliance_local_only",
        "severity": "critical",
        "details": {"policy": "compliance_local_only"},
    }


def test_what_was_found_then_is_refused_now(queue: Queue) -> None:
    """The record says what detection found; where it was off, there is nothing to go by."""
    found, unseen = queue.admit(Facts("coder", "chat", found=EMAIL)), queue.admit(detection="off")
    queue.policies.change("acme", Change("cli", "default_local_first", "refuse"))
    refusal = queue.look(found)
    assert refusal is not None
    assert refusal.facts["reason"] == "Detected email, which this organization refuses"
    assert (refusal.facts["sensitivity"], refusal.facts["details"]["vetoed_by"]) == ("sensitive", "detection")
    assert queue.look(unseen) is None


@pytest.mark.parametrize(("retryable", "code"), [(False, "policy_veto"), (True, "project_unverified")])
def test_a_project_that_changed(queue: Queue, retryable: bool, code: str) -> None:
    """Asked for anew; the event has what was known this time."""
    request_id = queue.admit(project_id="proj_0123456789ab", artifact_id="art_0123456789ab")
    queue.projects.answer = Standing({"status": "blocked"}, BLOCKED, retryable)
    refusal = queue.look(request_id)
    assert refusal is not None
    assert (refusal.kind, refusal.code, refusal.facts["reason"]) == ("vetoed", code, "Project is blocked")
    held = refusal.facts["details"]
    assert (held["psmp"], held["vetoed_by"], held["veto"]) == ({"status": "blocked"}, "project", BLOCKED.as_dict())
    assert queue.look(queue.admit()) is None
    assert len(queue.projects.asked) == 1


def test_requests_of_the_release_before(queue: Queue) -> None:
    """They were admitted without the facts; what was made of them is judged by the policy in force."""
    here = queue.admit(details=None)
    there = queue.admit(details=None, provider="openrouter", sensitivity="internal")
    bare = queue.admit(details=None, provider=None, sensitivity=None)
    assert [queue.look(each) for each in (here, there, bare)] == [None, None, None]
    queue.policies.change("acme", Change("cli", "enterprise_residency"))
    assert queue.look(here) is None
    assert queue.look(bare) is None
    refusal = queue.look(there)
    assert refusal is not None
    assert refusal.facts["reason"] == "Provider 'openrouter' disallowed for internal tasks"


def test_what_has_ended_is_left_alone(queue: Queue) -> None:
    """Nothing is asked about it, nor about an id that there is none of."""
    request_id = queue.admit(project_id="proj_0123456789ab")
    queue.database.write(lambda connection: lifecycle.cancel(connection, request_id, "acme"))
    queue.revoke()
    assert queue.look(request_id) is None
    assert queue.look(new_request_id()) is None
    assert queue.projects.asked == []


def test_one_query(queue: Queue) -> None:
    """That is all a request costs here."""
    request_id = queue.admit()
    others: list[str] = []
    engine = queue.database._engine
    sa.event.listen(engine, "before_cursor_execute", lambda _on, _cursor, statement, *_rest: others.append(statement))
    with patch.object(Statement, "alone", autospec=True, side_effect=Statement.alone) as asked:
        queue.look(request_id)
    assert (asked.call_count, others) == (1, [])


# --- How it ends ----------------------------------------------------------------------------------

VETOED = Refusal(
    "vetoed",
    "policy_veto",
    {"reason": "r" * 500, "policy": "compliance_local_only", "details": {"veto": {"reason": "x"}}},
)


@pytest.mark.parametrize("refusal", [VETOED, Refusal("failed", "key_revoked", {})], ids=["vetoed", "revoked"])
def test_the_state_machine(queue: Queue, refusal: Refusal) -> None:
    """It ends as failed, with one terminal event, and the view shows the second decision. Redelivered, it stays so."""
    request_id = queue.admit()
    for _ in range(2):
        started = queue.database.write(
            lambda connection: lifecycle.start(connection, request_id, lifecycle.FIRST_EPOCH, "gpu@a", 3, refusal)
        )
        assert started == NotStarted("failed", 0, refusal.code, answered=False)
    mine = audit_events.c.request_id == request_id
    query = sa.select(audit_events).where(mine, audit_events.c.kind.in_(TERMINAL_KINDS))
    event = queue.database.read(lambda connection: connection.execute(query).one())
    assert (event.kind, event.code, event.epoch, event.attempt) == (refusal.kind, refusal.code, 1, 0)
    view = sa.text("SELECT outcome, code, policy, started_at FROM audit_requests WHERE request_id = :id")
    shown = queue.database.read(lambda connection: connection.execute(view, {"id": request_id}).one())
    policy = refusal.facts.get("policy", "default_local_first")
    assert tuple(shown) == (refusal.kind, refusal.code, policy, None)


def test_what_ends_it_otherwise_goes_first(queue: Queue) -> None:
    """Cancelled, too late, or tried too often: that is what the record says, refused or not."""

    def start(request_id: str, refusal: Refusal | None = None, max_attempts: int = 3, epoch: int = 1) -> Any:
        return queue.database.write(
            lambda connection: lifecycle.start(connection, request_id, epoch, "gpu@a", max_attempts, refusal)
        )

    cancelled, tried, later = queue.admit(), queue.admit(), queue.admit()
    start(cancelled)
    queue.database.write(lambda connection: lifecycle.cancel(connection, cancelled, "acme"))
    assert start(cancelled, VETOED).state == "cancelled"
    start(tried)
    assert start(tried, VETOED, max_attempts=1).code == "attempts_exhausted"
    # A message of an epoch that is over decides nothing.
    assert start(later, VETOED, epoch=0).state == "queued"
    start(later)
    again = start(later, VETOED)
    assert (again.state, again.attempt, again.code) == ("failed", 1, "policy_veto")


# --- In a worker ----------------------------------------------------------------------------------


def refusing(worker: ScriptedWorker, *refusals: Refusal | Exception | None) -> None:
    """Have the worker's governance answer so, one after the other."""
    answers = iter(refusals)

    class Governance:
        """Asks nobody else."""

        asks_projects = False

        def by_record(self, _connection: Connection, _request_id: str) -> Refusal | None:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

    worker.runner = replace(worker.runner, recheck=cast("Recheck", Governance()))


@SQLITE
@pytest.mark.usefixtures("configured")
def test_the_engine_never_sees_it() -> None:
    """It is recorded, told and let go, in this order; the next request runs."""

    async def work(worker: ScriptedWorker) -> None:
        refused, fine = worker.message(), worker.message()
        refusing(worker, VETOED, None)
        assert await worker.run(refused) != "completed"
        assert worker.engine.asked == []
        assert (worker.row(refused).state, worker.terminal_event(refused).kind) == ("failed", "vetoed")
        last = worker.frames(refused)[-1]
        assert (last.event, last.data["code"], last.terminal) == ("failed", "policy_veto", True)
        worker.wait_until_let_go(refused)
        assert await worker.run(fine) == "completed"
        worker.check_end(fine, "completed", None)

    with_worker(work)


@SQLITE
@pytest.mark.usefixtures("configured")
def test_another_attempt_is_looked_at_again() -> None:
    """A worker was lost; by the time that another has the request, it is refused."""

    async def work(worker: ScriptedWorker) -> None:
        worker.engine.script = endless
        message: Message = worker.message()
        lost = await worker.running(message)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        refusing(worker, Refusal("failed", "key_revoked", {}))
        assert await worker.run(message) != "completed"
        worker.check_end(message, "failed", "key_revoked")
        assert len(worker.engine.asked) == 1

    with_worker(work)


@SQLITE
@pytest.mark.usefixtures("configured")
def test_a_database_that_is_away() -> None:
    """It is waited for: a request that nobody could look at again does not run."""

    async def work(worker: ScriptedWorker) -> None:
        worker.engine.script = three_words
        message = worker.message()
        refusing(worker, DatabaseUnavailable(), None)
        running = worker.run(message)
        await asyncio.sleep(0.2)
        assert worker.engine.asked == []
        assert await running == "completed"
        worker.check_end(message, "completed", None)

    with_worker(work)


# --- The whole of it ------------------------------------------------------------------------------


def ended(client: FlaskClient, request_id: str) -> dict[str, Any]:
    """Return a task once it has ended."""

    def look() -> dict[str, Any]:
        task: dict[str, Any] = client.get(f"/v1/tasks/{request_id}").get_json()
        return task if task["status"] in TERMINAL_STATES else {}

    return wait_until(look, 60, "the end of a task")


@SQLITE
def test_from_one_end_to_the_other(client: FlaskClient, tmp_path: Path) -> None:
    """Submitted, and then: a key revoked, a policy made stricter. Only then does a worker come; each API tells it."""
    app = client.application
    admin, leaver = app.test_client(), app.test_client()
    admin.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default', 'admin')}"
    leaver.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
    task = {"agent": "incident-responder", "sampling": {"max_tokens": 3}}
    personal = client.post("/v1/tasks", json={**task, "directive": "Write to jo@example.org."}).json["id"]
    plain = client.post("/v1/tasks", json={**task, "directive": "What now?"}).json["id"]
    orphan = leaver.post("/v1/tasks", json={**task, "directive": "What now?"}).json["id"]
    chats: list[Any] = []
    body = {"model": "incident-responder", "messages": [{"role": "user", "content": "Write to jo@example.org."}]}
    asking = [
        threading.Thread(target=lambda more=more: chats.append((more, app_post(admin, body | more))))
        for more in ({}, {"stream": True})
    ]
    for thread in asking:
        thread.start()
    wait_until(lambda: len(client.get("/v1/tasks").json["data"]) == 5, 20, "all to be queued")
    admin.put("/v1/policy", json={"policy": "default", "detection": "refuse"}, headers={"If-Match": "*"})
    revoke_key_of(client, orphan)
    worker = Worker(tmp_path / "worker.log")
    worker.start()
    try:
        assert ended(client, plain)["status"] == "completed"
        vetoed = ended(client, personal)
        revoked = ended(client, orphan)
        for thread in asking:
            thread.join(60)
    finally:
        worker.stop()
    assert (vetoed["status"], vetoed["attempt"], vetoed["error"]["code"]) == ("failed", 0, "policy_veto")
    assert vetoed["error"]["veto"]["reason"] == "Detected email, which this organization refuses"
    assert (revoked["status"], revoked["error"]["code"]) == ("failed", "key_revoked")
    assert "veto" not in revoked["error"]
    events = client.get(f"/v1/tasks/{personal}/events").text
    assert "event: failed\n" in events
    assert '"policy_veto"' in events
    answers = {bool(more): answer for more, answer in chats}
    assert answers[False].status_code == 403
    assert answers[False].json["error"]["code"] == "policy_veto"
    assert "policy_veto" in answers[True].text
    assert (
        "jo@example.org"
        not in events + answers[False].text + answers[True].text + (tmp_path / "worker.log").read_text()
    )


def app_post(client: FlaskClient, body: dict[str, Any]) -> Any:
    """Ask for a chat completion, and read it whole."""
    answer = client.post("/v1/chat/completions", data=json.dumps(body), content_type="application/json")
    assert answer.text
    return answer


def revoke_key_of(client: FlaskClient, request_id: str) -> None:
    """Revoke the key that sent a request."""
    database = Database(settings().database)
    try:
        query = sa.select(audit_events.c.api_key_id).where(audit_events.c.request_id == request_id)
        key_id = database.read(lambda connection: connection.execute(query).scalars().first())
        statement = (
            sa.update(api_keys).where(api_keys.c.key_id == key_id).values(revoked_at=now() - timedelta(seconds=1))
        )
        database.write(lambda connection: connection.execute(statement) and None)
    finally:
        database.close()
