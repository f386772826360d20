"""What becomes of a request, by the condition its project is found in and the governance mode in force.

The table is the whole rule; docs/metaqore.md shows the same one, and a test compares the two. The first four
conditions are MetaQore's own: `strict` vetoes, `adaptive` and `playground` record. The others are failures to learn
anything. There `strict` fails closed, since it promises that nothing runs for a blocked project, but its veto can be
retried; the other modes would let the request through whatever the answer was, so they do not stop it for want of one.
A mode that cannot be learnt needs no veto of its own: the strictest is applied in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tasks.governance.secure_gateway import Veto

Mode = Literal["strict", "adaptive", "playground"]
MODES: tuple[Mode, ...] = ("strict", "adaptive", "playground")
Outcome = Literal["veto", "recorded", "not asked"]
Severity = Literal["low", "medium", "high", "critical"]
Condition = Literal[
    "project_blocked",
    "project_failed",
    "critical_conflict",
    "artifact_blocked",
    "project_unknown",
    "conflicts_unread",
    "timeout",
    "unreachable",
    "server_error",
    "unauthorized",
    "bad_answer",
    "breaker_open",
    "mode_unknown",
    "no_project",
]


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table. `reason` is the veto's, with the project's id in it where the id is well formed."""

    outcomes: tuple[Outcome, Outcome, Outcome]
    reason: str = ""
    severity: Severity = "high"
    retryable: bool = False

    def outcome(self, mode: Mode) -> Outcome:
        """Return what happens in `mode`."""
        return self.outcomes[MODES.index(mode)]


_VETO: tuple[Outcome, Outcome, Outcome] = ("veto", "recorded", "recorded")
_RECORD: tuple[Outcome, Outcome, Outcome] = ("recorded", "recorded", "recorded")
_NOTHING: tuple[Outcome, Outcome, Outcome] = ("not asked", "not asked", "not asked")

#: In order of weight: the first condition that vetoes gives the veto its reason.
TABLE: dict[Condition, Rule] = {
    "project_blocked": Rule(_VETO, "Project '{project}' is blocked"),
    "project_failed": Rule(_VETO, "Project '{project}' has failed"),
    "critical_conflict": Rule(_VETO, "Project '{project}' has an unresolved critical conflict", "critical"),
    "artifact_blocked": Rule(_VETO, "Project '{project}' blocks the artifact that the request names"),
    "project_unknown": Rule(_VETO, "MetaQore knows no such project"),
    "conflicts_unread": Rule(
        _VETO, "Project '{project}' has more unresolved conflicts than were read", "medium", retryable=True
    ),
    "timeout": Rule(_VETO, "MetaQore did not answer in time", "medium", retryable=True),
    "unreachable": Rule(_VETO, "MetaQore cannot be reached", "medium", retryable=True),
    "server_error": Rule(_VETO, "MetaQore answered with an error of its own", "medium", retryable=True),
    "unauthorized": Rule(_VETO, "MetaQore does not accept the gateway's key", "medium", retryable=True),
    "bad_answer": Rule(_VETO, "MetaQore gave an answer that means nothing", "medium", retryable=True),
    "breaker_open": Rule(_VETO, "MetaQore has failed repeatedly and is left alone", "medium", retryable=True),
    "mode_unknown": Rule(_RECORD),
    "no_project": Rule(_NOTHING),
}


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the table says of all `conditions` together, which stand in its order."""

    outcome: Literal["passed", "recorded", "veto"]
    conditions: tuple[Condition, ...]
    veto: Veto | None = None
    retryable: bool = False


def rule(conditions: Iterable[Condition], mode: Mode, **named: Any) -> Ruling:
    """Return what becomes of the request. `named` goes into a veto's details; `project_id` also into its reason."""
    holding = set(conditions)
    found = tuple(condition for condition in TABLE if condition in holding)
    refusing = next((condition for condition in found if TABLE[condition].outcome(mode) == "veto"), None)
    if refusing is None:
        return Ruling("recorded" if found else "passed", found)
    row = TABLE[refusing]
    known = {name: value for name, value in named.items() if value is not None}
    veto = Veto(
        reason=row.reason.format(project=named.get("project_id")),
        policy_violated=f"psmp_{refusing}",
        severity=row.severity,
        details={"mode": mode, "conditions": list(found), **known},
    )
    return Ruling("veto", found, veto, row.retryable)
