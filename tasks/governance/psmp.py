"""What MetaQore knows of the project that a request belongs to, and whether the request may run for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tasks.governance.secure_gateway import Veto


@dataclass(frozen=True, slots=True)
class Standing:
    """A project as it was when somebody asked.

    `context` is what the audit event holds as `details.psmp`; `veto` is set if the request must not run. `retryable`
    tells that the veto is for want of an answer: nothing is known against the request, and asking later may help.
    """

    context: dict[str, Any]
    veto: Veto | None = None
    retryable: bool = False


class Projects(Protocol):
    """Tells how a request's project stands. Any thread may ask."""

    def standing(
        self, *, project_id: str | None, artifact_id: str | None, task_id: str | None, agent_name: str
    ) -> Standing | None:
        """Return how it stands, or None if the request names no project or no MetaQore is asked.

        Never raises and never blocks longer than its timeout: each failure has an outcome of its own.
        """

    def close(self) -> None:
        """Let go of connections and threads. Who asks afterwards is told that MetaQore cannot be reached."""
