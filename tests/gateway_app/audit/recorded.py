"""A small record of five days, made by the product's own functions on a clock that the test sets.

Two organizations, three keys and three agents; every way in which a request can end, and some that have not ended. All of it,
ids included, follows from one seed, so that the answers that docs/audit-queries.md shows stay the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gateway_app.profiles import history
from tasks import lifecycle
from tasks.audit import events
from tasks.audit.events import Subject
from tasks.crypto import KEY_BYTES
from tasks.db import Database
from tasks.errors import PolicyVeto
from tasks.governance import policies
from tasks.governance.decision import Facts, Found, decide, details
from tasks.governance.policies import Policies, PolicyVersion
from tasks.governance.secure_gateway import POLICIES
from tasks.ids import lower_bound
from tasks.job import Result, Timings, Usage
from tasks.lifecycle import Admission, Attempt, Refusal, admission, attempts, ending, giving_back, publication
from tasks.settings import DatabaseGroup
from tests.gateway_app.audit.recorded_changes import FIRST, KEYS, add_keys, changes

#: The day that the questions are asked for.
SINCE, UNTIL = datetime(2026, 11, 2, tzinfo=UTC), datetime(2026, 11, 3, tzinfo=UTC)
DAYS = 4
REQUESTS = 400
MAX_ATTEMPTS = 2
MAX_EPOCHS = 3
DEADLINE = timedelta(seconds=90)
VERSIONS = {"contract-validator": (1, 2), "incident-responder": (3,), "migration-planner": (1,)}
TASKS = ("task", "review", "plan_change")
WORKERS = ("gpu-1", "gpu-2", "gpu-3")
PROJECTS = ("proj_00000000000a", "proj_00000000000b", None)
#: What becomes of a request, and how often of 100.
ENDS = {
    "completed": 40, "retried": 8, "given_back": 5, "handed_back": 3, "requeued": 2, "exhausted": 3, "poison": 3,
    "queue_lost": 1, "failed": 4, "cancelled": 5, "stopped": 5, "expired": 5, "late": 2, "forbidden": 4, "revoked": 2,
    "malformed": 4, "waiting": 3, "running": 2,
}  # fmt: skip
CALM = PolicyVersion(0, "default_local_first", "record")


class Recording:
    """Makes the record in `database`."""

    def __init__(self, database: Database, seed: int) -> None:
        self._database = database
        self._chosen = random.Random(seed)
        self._policies = Policies(database, CALM)
        self.at = FIRST

    def now(self) -> datetime:
        """Return the time on the test's clock."""
        return self.at

    def new_id(self) -> str:
        """Return an id of this moment."""
        return f"{lower_bound(self.at)}7{self._chosen.getrandbits(12):03x}8{self._chosen.getrandbits(60):015x}"

    def make(self) -> None:
        """Make all of it."""
        self._database.write(add_keys)
        due = changes(self._database, self._policies)
        change: datetime | None = next(due)
        for number in range(REQUESTS):
            self.at = FIRST + timedelta(days=DAYS) * number / REQUESTS
            while change is not None and change <= self.at:
                change = next(due, None)
            self._request()

    def _request(self) -> None:
        """Have one request come in, and end in one of the ways."""
        chosen = self._chosen
        key_id = chosen.choices(list(KEYS), (6, 2, 2))[0]
        organization = KEYS[key_id][0]
        end = chosen.choices(list(ENDS), list(ENDS.values()))[0]
        subject = Subject(self.new_id(), organization, key_id, chosen.choice(list(VERSIONS)))
        if end == "malformed":
            unknown = Subject(subject.request_id, organization, key_id)
            self._write(lambda connection: lifecycle.refuse(connection, unknown, "failed", "invalid_request", {}))
            return
        facts = Facts(
            agent_name=str(subject.agent_name),
            task_type=chosen.choice(TASKS),
            private=chosen.random() < 0.1,
            security=chosen.random() < 0.05,
            provider_hint=chosen.choice((None, None, None, "hmcp_gateway", "ollama", "openrouter")),
            found=self._found(),
        )
        decision = self._decision(organization, facts)
        if "veto" in decision["details"]:
            self._pass(0.002)
            self._write(lambda connection: lifecycle.refuse(connection, subject, "vetoed", PolicyVeto.code, decision))
            return
        self._pass(0.01)
        prompt_tokens = chosen.randint(700, 2500)
        self._admit(subject, {**decision, "prompt_tokens": prompt_tokens})
        self._pass(chosen.uniform(0.1, 40))
        self._run(subject, end, prompt_tokens, decision)

    def _found(self) -> Found | None:
        kinds = self._chosen.sample(("email", "phone", "iban"), self._chosen.choice((0, 0, 0, 1, 2)))
        counts = {kind: self._chosen.randint(1, 3) for kind in kinds}
        return Found(counts, private=bool(counts), sensitive="iban" in counts)

    def _decision(self, organization: str, facts: Facts) -> dict[str, Any]:
        policy = self._policies.newest(organization)
        ruling = decide(facts, policy.policy, policy.detection, ("hmcp_gateway", "ollama"))
        held = details(facts, policy.detection, policy.version)
        if ruling.veto is not None:
            held |= {"veto": ruling.veto.as_dict(), "vetoed_by": ruling.vetoed_by}
        project = self._chosen.choice(PROJECTS)
        return {
            "task_type": facts.task_type,
            "sensitivity": ruling.sensitivity,
            "provider": ruling.provider,
            "policy": policy.policy,
            "reason": ruling.reason,
            "project_id": project,
            "artifact_id": f"art_{self._chosen.getrandbits(4):012x}" if project else None,
            "details": held,
        }

    def _admit(self, subject: Subject, decision: Mapping[str, Any]) -> None:
        version = self._chosen.choice(VERSIONS[str(subject.agent_name)])
        admitted = Admission(
            subject=subject,
            decision={**decision, "profile_version": version},
            static_profile_hash=f"{version:064x}",
            data_key=bytes(KEY_BYTES),
            payload=subject.request_id.encode(),
            columns={"api": "tasks", "priority": "normal", "deadline": self.at + DEADLINE},
            message=subject.request_id.encode(),
            prompt_tokens=decision["prompt_tokens"],
        )
        self._write(lambda connection: lifecycle.admit(connection, admitted))

    def _run(self, subject: Subject, end: str, prompt_tokens: int, decision: Mapping[str, Any]) -> None:
        request_id, organization = subject.request_id, subject.organization
        if end == "waiting":
            return
        if end == "cancelled":
            self._write(lambda connection: lifecycle.cancel(connection, request_id, organization))
        elif end == "expired":
            self._pass(DEADLINE.total_seconds())
            self._write(lambda connection: lifecycle.expire(connection, request_id))
        elif end in ("forbidden", "revoked"):
            self._start(request_id, self._refusal(end, decision))
        elif end == "queue_lost":
            for epoch in range(lifecycle.FIRST_EPOCH, MAX_EPOCHS + 1):
                self._pass(1)
                self._republish(request_id, epoch, 0)
        else:
            attempt = self._again(self._start(request_id), end)
            if end == "exhausted":
                self._pass(10)
                self._start(request_id)
            elif end == "poison":
                self._pass(2)
                self._give_back(attempt, "engine_dead", MAX_ATTEMPTS)
            elif end != "running":
                self._finish(attempt, end, prompt_tokens)

    def _again(self, attempt: Attempt, end: str) -> Attempt:
        """Have the attempt end without an answer, where that is part of it; return the one that runs then."""
        if end in ("retried", "exhausted"):
            self._pass(30)
        elif end in ("given_back", "poison"):
            self._pass(2)
            self._give_back(attempt, "engine_failed", MAX_ATTEMPTS)
        elif end == "handed_back":
            self._pass(5)
            self._give_back(attempt, "worker_draining", None)
        elif end == "requeued":
            self._pass(3)
            self._republish(attempt.subject.request_id, attempt.epoch, attempt.number)
        else:
            return attempt
        self._pass(1)
        again: Attempt = self._start(attempt.subject.request_id, epoch=attempt.epoch + (end == "requeued"))
        return again

    def _give_back(self, attempt: Attempt, code: str, most: int | None) -> None:
        self._write(lambda connection: lifecycle.give_back(connection, attempt, code, max_attempts=most))

    def _republish(self, request_id: str, epoch: int, attempt: int) -> None:
        self._write(lambda c: lifecycle.republish(c, request_id, epoch, attempt, max_epochs=MAX_EPOCHS))

    def _refusal(self, end: str, decision: Mapping[str, Any]) -> Refusal:
        """Return why the request is refused as it leaves the queue: no provider is up any more, or no key."""
        if end == "revoked":
            return Refusal("failed", "key_revoked", {})
        flags = decision["details"]["flags"]
        facts = Facts("agent", decision["task_type"], flags["private"], flags["sensitive"], flags["security"])
        policy = max(POLICIES)
        veto = decide(facts, policy, "off", ()).veto
        assert veto is not None
        held = {**decision["details"], "policy_version": 9, "veto": veto.as_dict(), "vetoed_by": "policy"}
        return Refusal(
            "vetoed", PolicyVeto.code, {**decision, "policy": policy, "reason": veto.reason, "details": held}
        )

    def _start(self, request_id: str, refusal: Refusal | None = None, epoch: int = lifecycle.FIRST_EPOCH) -> Any:
        worker = self._chosen.choice(WORKERS)
        return self._write(
            lambda connection: lifecycle.start(connection, request_id, epoch, worker, MAX_ATTEMPTS, refusal)
        )

    def _finish(self, attempt: Attempt, end: str, prompt_tokens: int) -> None:
        chosen = self._chosen
        if end == "failed":
            self._pass(3)
            self._write(lambda connection: lifecycle.finish(connection, attempt, "failed", code="engine_failed"))
            return
        queued, first, whole = sorted(round(chosen.uniform(1, 4_000), 1) for _ in range(3))
        self._pass(whole / 1000)
        if end == "stopped":
            request_id, organization = attempt.subject.request_id, attempt.subject.organization
            self._write(lambda connection: lifecycle.cancel(connection, request_id, organization))
        cached, output = chosen.randint(0, 600), chosen.randint(1, 256)
        result = Result(
            pieces=(),
            finish_reasons=() if end in ("stopped", "late") else ("stop",),
            model="SmolLM2-135M-Instruct",
            usage=Usage(prompt_tokens=prompt_tokens, cached_tokens=cached, output_tokens=output),
            timings=Timings(queued_ms=queued, prefill_ms=first - queued, first_token_ms=first, total_ms=whole),
        )
        state: Any = {"stopped": "cancelled", "late": "expired"}.get(end, "completed")
        self._write(lambda connection: lifecycle.answer(connection, attempt, result, b"sealed", state))

    def _pass(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)

    def _write(self, work: Any) -> Any:
        return self._database.write(work)


def fill(url: str, seed: int = 1) -> None:
    """Make the record in the empty database at `url`."""
    database = Database(DatabaseGroup(url=url))
    recording = Recording(database, seed)
    with pytest.MonkeyPatch.context() as patched:
        for module in (admission, attempts, ending, giving_back, publication, events, policies):
            patched.setattr(module, "now", recording.now)
        for module in (policies, history):
            patched.setattr(module, "new_request_id", recording.new_id)
        try:
            recording.make()
        finally:
            database.close()
