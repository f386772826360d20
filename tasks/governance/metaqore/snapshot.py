"""What MetaQore said of a project at one moment, reduced to what requests are asked about.

It is worked out once, when the answers come, since many requests look at it: a project may hold thousands of
artifacts. Only ids, kinds and states are taken over. Titles, descriptions and data are free text, which has no place in
audit events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tasks.governance.metaqore.answers import BlockingReport, Conflict, Project
from tasks.governance.metaqore.conflicts import Listing
from tasks.governance.metaqore.outcomes import Condition, Mode

#: Conflicts and blocked artifacts that an audit event lists, each; their whole number stands beside them.
LISTED = 20
_WEIGHTS = {"critical": 0, "high": 1, "medium": 2, "low": 3}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was said at `as_of`. With a `failure`, what did get an answer is there all the same.

    `mode` is None if the server did not name one of the three, or was not asked for it. `status`, `artifacts` (their
    ids) and `tasks` (their states by id) are None without an answer about the project; `conflicts` and
    `blocked_artifacts` are summaries as an audit event holds them, empty where nobody told. `blocked` has the ids of
    all blocked artifacts.
    """

    as_of: datetime
    failure: Condition | None = None
    mode: Mode | None = None
    status: str | None = None
    artifacts: frozenset[str] | None = None
    tasks: Mapping[str, str | None] | None = None
    blocked: frozenset[str] = frozenset()
    conflicts: Mapping[str, Any] = field(default_factory=dict)
    blocked_artifacts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        as_of: datetime,
        failure: Condition | None,
        mode: Mode | None,
        project: Project | None,
        report: BlockingReport | None,
        listing: Listing,
    ) -> Snapshot:
        """Return the snapshot that these answers make."""
        facts: dict[str, Any] = {}
        blocked: dict[str, None] = {}
        if report is not None or listing.conflicts or listing.failure is None:
            worst = _unresolved((*(report.conflicts if report else ()), *listing.conflicts))
            facts["conflicts"] = {
                "count": len(worst),
                "critical": sum(conflict.severity == "critical" for conflict in worst),
                "unread": listing.unread,
                "listed": [conflict.model_dump(exclude={"resolved", "project_id"}) for conflict in worst[:LISTED]],
            }
        if report is not None:
            blocked |= dict.fromkeys(report.blocked_artifacts)
        if project is not None:
            facts["status"] = project.status
            facts["artifacts"] = frozenset(artifact.id for artifact in project.artifacts)
            facts["tasks"] = {task.id: task.status for task in project.tasks}
            blocked |= dict.fromkeys(artifact.id for artifact in project.artifacts if artifact.is_blocked)
        if report is not None:
            facts["blocked_artifacts"] = {"count": len(blocked), "listed": list(blocked)[:LISTED]}
        return cls(as_of, failure, mode, blocked=frozenset(blocked), **facts)


def _unresolved(conflicts: Iterable[Conflict]) -> list[Conflict]:
    """Return the unresolved ones, the worst first, each once: where two answers disagree, the worse one counts."""
    found: dict[str, Conflict] = {}
    for conflict in sorted(conflicts, key=lambda conflict: _WEIGHTS[conflict.severity]):
        if not conflict.resolved:
            found.setdefault(conflict.id, conflict)
    return list(found.values())
