"""What another policy would have done: recorded requests, decided again by the same rules.

An event that admitted or refused a request holds all that the decision was made from (see tasks/governance/decision.py),
so no prompt is needed, and none is read. Events are read in pages, in the order of their ids, and only counts, a few
example ids and a bounded number of groups are kept: memory does not grow with the period.

What a project's standing decided is no policy's doing and stays as it was. A request that was refused again when it left
the queue counts as admitted, which is what the policy decided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Row

from tasks.db import Database
from tasks.governance.decision import Detection, decide, facts_of
from tasks.ids import lower_bound
from tasks.schema import audit_events

Change = Literal["allowed_to_vetoed", "vetoed_to_allowed", "provider_changed", "unchanged"]
#: In the order in which they are shown.
CHANGES: tuple[Change, ...] = ("allowed_to_vetoed", "vetoed_to_allowed", "provider_changed", "unchanged")
EARLIER_RELEASE = "recorded by a release that kept too little of the decision"
NOT_SCANNED = "nothing was looked for in the request's texts, since detection was off"
#: Events that one query reads.
PAGE = 1000
#: Example ids of each change.
EXAMPLES = 5
#: Pairs of agent and task type that are told apart; a caller chooses task types freely.
GROUPS = 1000
OTHERS = ("(others)", "(others)")

_COLUMNS = ("request_id", "kind", "epoch", "organization", "agent_name", "task_type", "provider", "details")


@dataclass(frozen=True, slots=True)
class Trial:
    """What is tried on whose requests. Without `detection` each request keeps the mode that it was decided under.

    The period is that of the requests' ids: `since` belongs to it, `until` does not. `policy` is a full name.
    """

    organization: str
    since: datetime
    until: datetime
    policy: str
    available: Collection[str]
    detection: Detection | None = None


@dataclass(slots=True)
class Report:
    """What would have changed. `groups` are by agent and task type, `skipped` by the reason."""

    changes: Counter[Change] = field(default_factory=Counter)
    examples: dict[Change, list[str]] = field(default_factory=dict)
    groups: dict[tuple[str, str], Counter[Change]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def replayed(self) -> int:
        """Return how many requests were decided again."""
        return self.changes.total()

    def count(self, change: Change, row: Row[Any]) -> None:
        """Count one request."""
        self.changes[change] += 1
        if change != "unchanged" and len(examples := self.examples.setdefault(change, [])) < EXAMPLES:
            examples.append(row.request_id)
        group = (row.agent_name, row.task_type)
        if group not in self.groups and len(self.groups) >= GROUPS:
            group = OTHERS
        self.groups.setdefault(group, Counter())[change] += 1

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it, the groups with most changes first."""
        groups = sorted(
            self.groups.items(), key=lambda item: (-(item[1].total() - item[1]["unchanged"]), -item[1].total(), item[0])
        )
        return {
            "replayed": self.replayed,
            "changes": {change: self.changes[change] for change in CHANGES},
            "examples": {change: self.examples.get(change, []) for change in CHANGES[:-1]},
            "groups": [
                {"agent": agent, "task_type": task_type, **{change: counts[change] for change in CHANGES}}
                for (agent, task_type), counts in groups
            ],
            "not_replayed": dict(self.skipped),
        }


def simulate(database: Database, trial: Trial) -> Report:
    """Decide an organization's recorded requests again. Raises DatabaseUnavailable."""
    report = Report()
    for row in _decisions(database, trial):
        change = _change(row, trial)
        if change in CHANGES:
            report.count(change, row)
        else:
            report.skipped[change] += 1
    return report


def _decisions(database: Database, trial: Trial) -> Iterator[Row[Any]]:
    """Yield the events that first decided about the organization's requests, by id."""
    after, end = lower_bound(trial.since), lower_bound(trial.until)
    while True:
        # Of all organizations: a page takes as long whatever is in it, and the key's order needs no other index.
        query = (
            sa.select(*(audit_events.c[name] for name in _COLUMNS))
            .where(
                audit_events.c.request_id > after,
                audit_events.c.request_id < end,
                audit_events.c.kind.in_(("admitted", "vetoed")),
            )
            .order_by(audit_events.c.request_id, audit_events.c.kind)
            .limit(PAGE)
        )
        rows = database.read(lambda connection, query=query: connection.execute(query).all())  # type: ignore[misc]
        for row in rows:
            # A veto of a later epoch came after the request had been admitted, which is counted.
            if row.organization == trial.organization and (row.kind == "admitted" or row.epoch == 0):
                yield row
        if len(rows) < PAGE:
            return
        after = rows[-1].request_id


def _change(row: Row[Any], trial: Trial) -> Change | str:
    """Return what would have changed for a request, or why that cannot be told."""
    facts, held = facts_of(row), row.details or {}
    if facts is None:
        return EARLIER_RELEASE
    detection = trial.detection or held["detection"]
    if detection in ("raise", "refuse") and facts.found is None:
        return NOT_SCANNED
    ruling = decide(facts, trial.policy, detection, trial.available)
    was_vetoed = row.kind == "vetoed"
    vetoed = ruling.veto is not None or held.get("vetoed_by") == "project"
    if was_vetoed != vetoed:
        return "allowed_to_vetoed" if vetoed else "vetoed_to_allowed"
    return "provider_changed" if not vetoed and ruling.provider != row.provider else "unchanged"
