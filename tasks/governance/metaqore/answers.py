"""What MetaQore answers, as far as the gateway reads it. Whatever does not fit is a bad answer.

Fields that the gateway does not use are ignored, so that MetaQore may add some. Free text is not read at all.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tasks.governance.metaqore.outcomes import Mode, Severity

#: Ids and kinds go into audit events: short, and without control characters.
Word = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
ProjectStatus = Literal["initialized", "planning", "in_progress", "completed", "failed", "blocked"]


class Answered(BaseModel):
    """Base of what is read from MetaQore."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Health(Answered):
    """`data` of `GET /health`."""

    governance_mode: Mode


class Conflict(Answered):
    """What PSMP has found to be in the way."""

    id: Word
    artifact_id: Word | None = None
    project_id: Word | None = None
    severity: Severity
    conflict_type: Word = "generic"
    resolved: bool = False


class Artifact(Answered):
    """One of a project's artifacts."""

    id: Word
    is_blocked: bool = False


class Task(Answered):
    """One of a project's tasks."""

    id: Word
    status: Word | None = None


class Project(Answered):
    """`data` of `GET /projects/{id}`."""

    id: Word
    status: ProjectStatus
    artifacts: tuple[Artifact, ...]
    tasks: tuple[Task, ...]


class BlockingReport(Answered):
    """`data` of `GET /governance/blocking-report`."""

    project_id: Word
    conflicts: tuple[Conflict, ...]
    blocked_artifacts: tuple[Word, ...]


class ConflictPage(Answered):
    """`data` of `GET /governance/conflicts`: one page of the list. `total` counts the conflicts of all pages."""

    project_id: Word | None = None
    conflicts: tuple[Conflict, ...]
    total: int = Field(ge=0, le=10**9)


class HealthEnvelope(Answered):
    """The whole answer about the server."""

    status: Literal["success"]
    data: Health


class ProjectEnvelope(Answered):
    """The whole answer about a project."""

    status: Literal["success"]
    data: Project


class ReportEnvelope(Answered):
    """The whole answer about what is blocked."""

    status: Literal["success"]
    data: BlockingReport


class ConflictsEnvelope(Answered):
    """The whole answer about a project's conflicts."""

    status: Literal["success"]
    data: ConflictPage


class Refusal(Answered):
    """How MetaQore says that something is not there."""

    detail: str
