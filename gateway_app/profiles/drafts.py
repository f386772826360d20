"""What is sent to make or change an agent, checked before anything else is done with it."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import AfterValidator, Field, StringConstraints, field_validator

from tasks.job import Frozen
from tasks.prompts.profile import Profile, Segment, SegmentKind

MAX_TEXT_BYTES = 256 * 2**10
MAX_SEGMENTS = 64
#: The largest number that the tables hold.
MAX_VERSION = 2**31 - 1
#: Control characters other than tab, line feed and carriage return.
FORBIDDEN = frozenset(map(chr, (*range(9), 11, 12, *range(14, 32), 127)))


def _stays_in_a_path(name: str) -> str:
    if name in (".", ".."):
        raise ValueError("this name would be taken out of a path")
    return name


#: As every name, and part of a path: without slashes.
AgentName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f/]+$"),
    AfterValidator(_stays_in_a_path),
]
VersionNumber = Annotated[int, Field(ge=1, le=MAX_VERSION)]


class Draft(Frozen):
    """A profile's text, of an agent that is named elsewhere."""

    description: str = Field(default="", max_length=500, description="One line for lists.")
    segments: tuple[Segment, ...] = Field(min_length=1, max_length=MAX_SEGMENTS, strict=False)
    activate: bool = Field(default=False, description="Make it the active version in the same step.")

    @field_validator("description")
    @classmethod
    def _is_text(cls, description: str) -> str:
        if not FORBIDDEN.isdisjoint(description):
            raise ValueError("control characters are not allowed")
        return description

    @field_validator("segments")
    @classmethod
    def _is_a_profile(cls, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        order = get_args(SegmentKind)
        ranks = [order.index(segment.kind) for segment in segments]
        if ranks != sorted(ranks):
            raise ValueError(f"segments must come in the order {', '.join(order)}")
        for index, segment in enumerate(segments):
            if not segment.text.strip():
                raise ValueError(f"the text of segment {index} is blank")
            if not FORBIDDEN.isdisjoint(segment.text):
                raise ValueError(
                    f"the text of segment {index} holds control characters; "
                    "only tab, line feed and carriage return are allowed"
                )
        size = sum(len(segment.text.encode()) for segment in segments)
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"the text has {size} bytes; at most {MAX_TEXT_BYTES} are allowed")
        return segments

    def profile(self, agent: str, version: int) -> Profile:
        """Return it as a version of an agent."""
        return Profile(agent=agent, version=version, description=self.description, segments=self.segments)


class NewAgent(Draft):
    """An agent that there is none of yet."""

    agent: AgentName


class NewVersion(Draft):
    """Another version of an agent that there is."""

    base_version: VersionNumber | None = Field(
        default=None, description="The newest version as you know it; refused if there is a newer one."
    )


class ActivateVersion(Frozen):
    """Which version is to be the active one."""

    version: VersionNumber
