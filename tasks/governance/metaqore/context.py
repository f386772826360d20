"""What a snapshot means for one request: the conditions that hold, and the PSMP context for its audit event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from tasks.governance.metaqore.outcomes import Condition, Mode
from tasks.governance.metaqore.snapshot import Snapshot

#: How the mode in force is known.
ModeSource = Literal["setting", "metaqore", "remembered", "assumed"]


@dataclass(frozen=True, slots=True)
class Named:
    """What a request says it is about."""

    project_id: str
    artifact_id: str | None
    task_id: str | None
    agent_name: str


def conditions(snapshot: Snapshot, named: Named, source: ModeSource) -> Iterator[Condition]:
    """Give each condition that holds."""
    if snapshot.failure is not None:
        yield snapshot.failure
    if snapshot.status == "blocked":
        yield "project_blocked"
    if snapshot.status == "failed":
        yield "project_failed"
    if snapshot.conflicts.get("critical"):
        yield "critical_conflict"
    if snapshot.conflicts.get("unread"):
        yield "conflicts_unread"
    if named.artifact_id in snapshot.blocked:
        yield "artifact_blocked"
    if source in ("remembered", "assumed"):
        yield "mode_unknown"


def context(snapshot: Snapshot, named: Named, mode: Mode, source: ModeSource, now: datetime) -> dict[str, Any]:
    """Return what was known at `now`, JSON-serialisable; `age_s` tells how old that was, in seconds."""
    shown: dict[str, Any] = {
        "mode": mode,
        "mode_source": source,
        "project": {"id": named.project_id, "status": snapshot.status},
        "agent": named.agent_name,
        "as_of": snapshot.as_of.isoformat(),
        "age_s": round(max(0.0, (now - snapshot.as_of).total_seconds()), 3),
    }
    if named.artifact_id is not None:
        shown["artifact"] = {
            "id": named.artifact_id,
            "known": None if snapshot.artifacts is None else named.artifact_id in snapshot.artifacts,
            "blocked": None if snapshot.artifacts is None else named.artifact_id in snapshot.blocked,
        }
    if named.task_id is not None:
        shown["task"] = {
            "id": named.task_id,
            "known": None if snapshot.tasks is None else named.task_id in snapshot.tasks,
            "status": None if snapshot.tasks is None else snapshot.tasks.get(named.task_id),
        }
    if snapshot.conflicts:
        shown["unresolved_conflicts"] = dict(snapshot.conflicts)
    if snapshot.blocked_artifacts:
        shown["blocked_artifacts"] = dict(snapshot.blocked_artifacts)
    return shown
