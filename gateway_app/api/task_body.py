"""What `POST /v1/tasks` takes: an agent, a directive, and what the agent is to work on."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field, StringConstraints, field_validator

from tasks.errors import InvalidRequest
from tasks.job import Frozen, Instant, Name, Priority, Sampling, TaskRequest

CONTEXT_HEADING = "\n\nContext:\n"
#: Control characters other than tab, line feed and carriage return.
_FORBIDDEN = frozenset(map(chr, (*range(9), 11, 12, *range(14, 32), 127)))
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16, description="The caller's own notes, returned with the request."),
]


class TaskBody(Frozen):
    """One task for one agent."""

    agent: Name = Field(description="Name of an active agent profile.", examples=["incident-responder"])
    task_type: Name = Field(default="task", description="What kind of work this is; policies read it.")
    directive: str = Field(
        min_length=1,
        description="What the agent is to do, in words.",
        examples=["Name the most likely cause in one sentence."],
    )
    context: str | dict[str, Any] | list[Any] | None = Field(
        default=None, description="What the agent is to work on: text, or JSON that is shown to it as JSON."
    )
    project_id: Name | None = Field(default=None, examples=["proj_0123456789ab"])
    artifact_id: Name | None = Field(default=None, examples=["art_0123456789ab"])
    task_id: Name | None = Field(default=None, examples=["task_0123456789ab"])
    provider_hint: Name | None = Field(
        default=None, description="Provider to use; refused if the policy forbids it. Left out, the gateway picks."
    )
    has_private_data: bool = False
    has_sensitive_data: bool = False
    is_security_task: bool = False
    sampling: Sampling = Sampling()
    metadata: Metadata = Field(default_factory=dict)
    priority: Priority = Field(default="normal", description="How far ahead of its turn it may run.")
    deadline: Instant | None = Field(
        default=None, description="When the answer is of no more use (RFC 3339); it expires then."
    )

    @field_validator("directive")
    @classmethod
    def _says_something(cls, directive: str) -> str:
        if not directive.strip():
            raise ValueError("must not be blank")
        return directive

    @field_validator("deadline")
    @classmethod
    def _in_utc(cls, deadline: datetime | None) -> datetime | None:
        try:
            return None if deadline is None else deadline.astimezone(UTC)
        except OverflowError:
            raise ValueError("must lie in the years 1 to 9999") from None

    def request(self) -> TaskRequest:
        """Return the request this is. Raises InvalidRequest if its text holds control characters."""
        facts = {name: getattr(self, name) for name in TaskRequest.model_fields if name in TaskBody.model_fields}
        message = {"role": "user", "content": self._user_text()}
        return TaskRequest(api="tasks", messages=(message,), **facts)

    def _user_text(self) -> str:
        """Return the text of the user's turn: the directive, then the context under its heading."""
        for name, text in (("directive", self.directive), ("context", self.context)):
            if isinstance(text, str) and not _FORBIDDEN.isdisjoint(text):
                message = "only tab, line feed and carriage return are allowed (strip ANSI codes)"
                raise InvalidRequest(f"{name} holds control characters", errors=[{"field": name, "message": message}])
        if self.context is None or self.context == "":
            return self.directive
        shown = (
            self.context if isinstance(self.context, str) else json.dumps(self.context, ensure_ascii=False, indent=1)
        )
        return self.directive + CONTEXT_HEADING + shown
