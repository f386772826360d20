"""Why a request ran where it did: the queue's decision for each attempt, beside what the worker then found in its KV cache.

A decision is recorded with the `started` event of the attempt that it led to (`tasks.queueing.decision`); what was found, with
the event that ended it. The same decision can be asked of another strategy: its file is run in Redis over the candidates that were recorded, so
it says what that strategy makes of the same moment, not what would have become of the queue under it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.db import Database
from tasks.queueing.decision import Decision, recorded
from tasks.queueing.pull import Strategy
from tasks.queueing.scripts import Scripts
from tasks.schema import audit_events, profiles


@dataclass(frozen=True, slots=True)
class Replayed:
    """What another strategy makes of a decision: a price for each candidate, when it may go, and which goes, if any."""

    strategy: Strategy
    prices: tuple[float, ...]
    eligible_at: tuple[float, ...]
    chosen: int | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt. Where `decision` is None, none was recorded; where `cached_tokens` is, its prompt was never computed.

    `names` says by the hash of each candidate's profile which agent's it is, and which version.
    """

    number: int
    started_at: datetime
    worker: str | None
    decision: Decision | None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def document(self, replayed: Replayed | None = None) -> dict[str, Any]:
        """Return it as JSON has it."""
        decision = self.decision
        shown: dict[str, Any] = {
            "attempt": self.number,
            "started_at": self.started_at.isoformat(),
            "worker": self.worker,
            "prompt_tokens": self.prompt_tokens,
            "expected_tokens": decision.predicted_tokens if decision else None,
            "cached_tokens": self.cached_tokens,
            "schedule": decision.document() if decision else None,
        }
        for candidate in shown["schedule"]["candidates"] if decision else ():
            candidate["name"] = self.name(candidate["profile"])
        if replayed is not None:
            shown["replay"] = {
                "strategy": replayed.strategy,
                "prices": replayed.prices,
                "eligible_at": replayed.eligible_at,
                "chosen": replayed.chosen,
            }
        return shown

    def shown(self) -> dict[str, Any]:
        """Return what the request's organization is shown: nothing of what its worker did for others. Times are relative."""
        decision = self.decision
        at = decision.at if decision else 0.0
        return {
            "attempt": self.number,
            "started_at": self.started_at.isoformat(),
            "worker": self.worker,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "expected_tokens": decision.predicted_tokens if decision else None,
            "strategy": decision.strategy if decision else None,
            "batch": decision.batch if decision else None,
            "chosen": decision.chosen if decision else None,
            "candidates": [
                {
                    "name": self.name(one.profile),
                    "static_profile_hash": one.static_profile_hash,
                    "waiting": one.waiting,
                    "waited_s": one.waited,
                    "static_tokens": one.static,
                    "cached_tokens": one.cached,
                    "seconds": one.seconds,
                    "copies": one.copies,
                    "price_s": None if one.price is None else round(one.price - at, 4),
                    "eligible_in_s": max(0.0, round(one.eligible_at - at, 4)),
                }
                for one in (decision.candidates if decision else ())
            ],
        }

    def name(self, listed: str) -> str:
        """Return what people call the profile of a list, and its priority if that is not the usual one."""
        static_profile_hash, _, priority = listed.partition(":")
        name = self.names.get(static_profile_hash, static_profile_hash[:12])
        return f"{name}, {priority}" if priority else name


def attempts(database: Database, request_id: str, organization: str) -> list[Attempt]:
    """Return the attempts of an organization's request, in their order. Raises DatabaseUnavailable."""
    return database.read(lambda connection: _attempts(connection, request_id, organization))


def replay(scripts: Scripts, decision: Decision, strategy: Strategy) -> Replayed:
    """Ask the strategy that `scripts` were made for about a decision. Raises redis.RedisError."""
    answer = json.loads(scripts.run("replay", json.dumps(decision.document())))
    chosen = answer["chosen"]
    return Replayed(
        strategy, tuple(answer["prices"]), tuple(answer["eligible_at"]), None if chosen < 0 else int(chosen)
    )


def _attempts(connection: Connection, request_id: str, organization: str) -> list[Attempt]:
    columns = audit_events.c
    query = sa.select(
        columns.kind, columns.attempt, columns.occurred_at, columns.worker, columns.details,
        columns.prompt_tokens, columns.cached_tokens,
    )  # fmt: skip
    query = query.where(columns.request_id == request_id, columns.organization == organization, columns.attempt > 0)
    rows = connection.execute(query.order_by(columns.attempt, columns.occurred_at)).all()
    computed = {row.attempt: row for row in rows if row.cached_tokens is not None}
    decisions = {row.attempt: recorded(row.details) for row in rows if row.kind == "started"}
    names = _names(connection, organization, (each for each in decisions.values() if each is not None))
    found = []
    for row in rows:
        if row.kind == "started":
            end = computed.get(row.attempt)
            prompt_tokens, cached_tokens = (None, None) if end is None else (end.prompt_tokens, end.cached_tokens)
            decision = decisions[row.attempt]
            found.append(
                Attempt(row.attempt, row.occurred_at, row.worker, decision, prompt_tokens, cached_tokens, names)
            )
    return found


def _names(connection: Connection, organization: str, decisions: Iterable[Decision]) -> dict[str, str]:
    """Return the agent and version of each profile that the organization has."""
    hashes = {candidate.static_profile_hash for decision in decisions for candidate in decision.candidates}
    query = sa.select(profiles.c.static_profile_hash, profiles.c.agent_name, profiles.c.version).where(
        profiles.c.static_profile_hash.in_(hashes), profiles.c.organization == organization
    )
    return {row.static_profile_hash: f"{row.agent_name} v{row.version}" for row in connection.execute(query)}
