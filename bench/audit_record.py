"""A large audit record, made up: twenty organizations that ask two hundred agents, as unevenly as it happens.

Every request has the events that the product gives it, with the columns that the product fills in. Requests come in the order of
time and each one's events follow at once, which is nearly the order in which a gateway inserts them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any

from tasks.ids import lower_bound
from tasks.schema import audit_events

ORGANIZATIONS = [f"organization-{number:02}" for number in range(20)]
KEYS = [f"key_{number:016x}" for number in range(60)]
AGENTS = [f"agent-{number:03}" for number in range(200)]
WORKERS = [f"gpu-{number:02}" for number in range(16)]
PROJECTS = [f"proj_{number:012x}" for number in range(500)]
TASKS = ("task", "review", "plan", "summarise", "state_update")
SENSITIVITIES = ("public", "internal", "sensitive", "critical")
DETECTED = ("email", "phone", "credit_card", "api_key", "iban")
POLICY = "default_local_first"
#: How requests end, of 1,000: refused by the policy, refused for their form, and the ends of those that were queued.
ENDS = {"vetoed": 30, "refused": 10, "completed": 915, "failed": 15, "cancelled": 15, "expired": 10, "dead": 5}
RETRIED = 0.01
#: Of those that were begun again, how many had been given back; the others' workers were lost.
GIVEN_BACK = 0.5
CHANGES_PER_DAY = 4
COLUMNS = [column.name for column in audit_events.columns if column.server_default is None]
_INDEX = {name: index for index, name in enumerate(COLUMNS)}


def _zipf(count: int) -> list[float]:
    return list(accumulate(1 / rank for rank in range(1, count + 1)))


@dataclass(frozen=True, slots=True)
class Record:
    """A record of `requests` requests over `days` days from the first of this month on, the same for the same seed."""

    requests: int
    days: int
    seed: int

    @property
    def start(self) -> datetime:
        """Return when it begins."""
        return datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)

    @property
    def end(self) -> datetime:
        """Return when it is over."""
        return self.start + timedelta(days=self.days)

    def policy_version(self, moment: datetime) -> int:
        """Return the version of the policy that holds then: a new one comes every three days."""
        return (moment - self.start).days // 3

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Make all events, as values of `COLUMNS`."""
        chosen = random.Random(self.seed)
        organizations, agents, projects = _zipf(len(ORGANIZATIONS)), _zipf(len(AGENTS)), _zipf(len(PROJECTS))
        step = timedelta(days=self.days) / self.requests
        every = max(1, self.requests // max(1, self.days * CHANGES_PER_DAY))
        kinds, weights = list(ENDS), list(accumulate(ENDS.values()))
        for number in range(self.requests):
            at = self.start + step * number
            if number % every == 0:
                yield self._change(chosen, at, number // every)
            organization = chosen.choices(range(len(ORGANIZATIONS)), cum_weights=organizations)[0]
            common = {
                "request_id": _id(chosen, at),
                "organization": ORGANIZATIONS[organization],
                "api_key_id": KEYS[organization * 3 + chosen.choice((0, 0, 0, 0, 0, 1, 1, 2))],
                "agent_name": chosen.choices(AGENTS, cum_weights=agents)[0],
            }
            end = chosen.choices(kinds, cum_weights=weights)[0]
            decision = self._decision(chosen, at, chosen.choices(PROJECTS, cum_weights=projects)[0])
            yield from _events(chosen, at, common, decision, end)

    def _decision(self, chosen: random.Random, at: datetime, project: str) -> dict[str, Any]:
        details: dict[str, Any] = {
            "flags": {"private": False, "sensitive": False, "security": False},
            "policy_version": self.policy_version(at),
        }
        if chosen.random() < 0.1:
            details["detected"] = {chosen.choice(DETECTED): chosen.randint(1, 4)}
        return {
            "task_type": chosen.choice(TASKS),
            "sensitivity": chosen.choices(SENSITIVITIES, (60, 20, 15, 5))[0],
            "provider": "hmcp_gateway",
            "policy": POLICY,
            "reason": "auto_recommendation",
            "project_id": project if chosen.random() < 0.5 else None,
            "details": details,
        }

    def _change(self, chosen: random.Random, at: datetime, number: int) -> tuple[Any, ...]:
        kind = "policy_changed" if number % 4 == 0 else "profile_changed"
        organization = number % len(ORGANIZATIONS)
        return _row(
            at,
            kind,
            request_id=_id(chosen, at),
            organization=ORGANIZATIONS[organization],
            api_key_id=KEYS[3 * organization],
            details=json.dumps({"from": number, "to": number + 1}),
        )


def _id(chosen: random.Random, at: datetime) -> str:
    return f"{lower_bound(at)}7{chosen.getrandbits(12):03x}8{chosen.getrandbits(60):015x}"


def _row(at: datetime, kind: str, attempt: int = 0, epoch: int = 0, **values: Any) -> tuple[Any, ...]:
    row: list[Any] = [None] * len(COLUMNS)
    # Without its zone SQLite's own driver writes it as SQLAlchemy does; PostgreSQL's session is in UTC.
    values |= {"kind": kind, "attempt": attempt, "epoch": epoch, "occurred_at": f"{at:%Y-%m-%d %H:%M:%S.%f}"}
    for name, value in values.items():
        row[_INDEX[name]] = value
    return tuple(row)


def _events(
    chosen: random.Random, at: datetime, common: dict[str, Any], decision: dict[str, Any], end: str
) -> Iterator[tuple[Any, ...]]:
    yield _row(at, "received", **common)
    at += timedelta(milliseconds=chosen.uniform(1, 20))
    if end == "refused":
        yield _row(at, "failed", **common, code="invalid_request")
        return
    details = decision.pop("details")
    if end == "vetoed":
        details["veto"] = {"policy_violated": POLICY, "severity": "critical", "details": {"policy": POLICY}}
        decision |= {"provider": "openrouter", "reason": "Provider 'openrouter' disallowed for sensitive tasks"}
        yield _row(at, "vetoed", **common, **decision, details=json.dumps(details), code="policy_veto")
        return
    prompt_tokens = chosen.randint(500, 8000)
    yield _row(
        at,
        "admitted",
        epoch=1,
        **common,
        **decision,
        details=json.dumps(details),
        prompt_tokens=prompt_tokens,
        profile_version=chosen.choice((1, 1, 1, 2, 3)),
        static_profile_hash=f"{chosen.getrandbits(64):064x}",
        payload_sha256=f"{chosen.getrandbits(256):064x}",
    )
    queued_ms = chosen.expovariate(1 / 200)
    attempt, worker = 0, ""
    for attempt in range(1, 3 if chosen.random() < RETRIED else 2):
        at += timedelta(milliseconds=queued_ms)
        if attempt > 1 and chosen.random() < GIVEN_BACK:
            yield _row(at, "requeued", attempt - 1, 1, **common, worker=worker, code="engine_failed")
        worker = chosen.choice(WORKERS)
        yield _row(at, "started", attempt, 1, **common, worker=worker)
    if end == "dead":
        why = json.dumps({"last_code": "engine_dead"})
        yield _row(at, end, attempt, 1, **common, worker=worker, code="attempts_exhausted", details=why)
        return
    if end == "failed":
        yield _row(at, end, attempt, 1, **common, worker=worker, code=chosen.choice(("engine_failed", "engine_dead")))
        return
    first_ms, total_ms = queued_ms + chosen.expovariate(1 / 100), queued_ms + chosen.expovariate(1 / 5000) + 200
    yield _row(
        at + timedelta(milliseconds=total_ms),
        end,
        attempt,
        1,
        **common,
        worker=worker,
        code=None if end == "completed" else end,
        model="a-model",
        prompt_tokens=prompt_tokens,
        cached_tokens=int(prompt_tokens * chosen.random()),
        output_tokens=chosen.randint(1, 800),
        queued_ms=queued_ms,
        prefill_ms=first_ms - queued_ms,
        first_token_ms=first_ms,
        total_ms=total_ms,
        payload_sha256=f"{chosen.getrandbits(256):064x}",
        details=json.dumps({"finish_reason": "stop"}),
    )
