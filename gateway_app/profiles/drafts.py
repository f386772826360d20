"""What is sent to make or change an agent, checked before anything else is done with it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints, field_validator

from tasks.errors import InvalidRequest
from tasks.job import Frozen, Name
from tasks.prompts.profile import ORDER, AnySegment, FewShot, Profile, Segment, in_order
from tasks.settings import ProfilesGroup

#: The largest number that the tables hold.
MAX_VERSION = 2**31 - 1
MAX_WARM_S = 600
MAX_COPIES = 64
#: Names that would be taken out of a path, or for another path.
RESERVED_NAMES = (".", "..", "import")
#: Control characters other than tab, line feed and carriage return.
FORBIDDEN = frozenset(map(chr, (*range(9), 11, 12, *range(14, 32), 127)))


def _is_free(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError("this name has a meaning of its own in a path")
    return name


#: As every name, and part of a path: without slashes.
AgentName = Annotated[
    str,
    StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f/]+$"),
    AfterValidator(_is_free),
]
VersionNumber = Annotated[int, Field(ge=1, le=MAX_VERSION)]
_Line = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Because(Frozen):
    """Who changes something, and why: both go into the audit as they are."""

    author: Name | None = Field(default=None, description="Whoever stands behind the API key.")
    reason: _Line | None = Field(default=None, description="One line for those who read the history.")


class Warmed(Because):
    """What makes a version one that requests get; it is computed on workers beforehand."""

    warm_s: float | None = Field(
        default=None,
        ge=0,
        le=MAX_WARM_S,
        description="Seconds to wait until it is computed; 0: not at all. Left out, as the settings say.",
    )


class ProfileText(Frozen):
    """A profile's text, of an agent that is named elsewhere."""

    description: str = Field(default="", max_length=500, description="One line for lists.")
    extends: Name | None = Field(default=None, description="The agent whose segments go before these.")
    abstract: bool = Field(default=False, description="Only there to be extended: requests cannot name it.")
    segments: tuple[AnySegment, ...] = Field(min_length=1, strict=False)

    @field_validator("description")
    @classmethod
    def _is_text(cls, description: str) -> str:
        if not FORBIDDEN.isdisjoint(description):
            raise ValueError("control characters are not allowed")
        return description

    @field_validator("segments")
    @classmethod
    def _is_a_profile(cls, segments: tuple[AnySegment, ...]) -> tuple[AnySegment, ...]:
        if not in_order(segments):
            raise ValueError(f"segments must come in the order {', '.join(ORDER)}")
        for index, text in ((index, text) for index, segment in enumerate(segments) for text in _texts(segment)):
            if not text.strip():
                raise ValueError(f"a text of segment {index} is blank")
            if not FORBIDDEN.isdisjoint(text):
                raise ValueError(
                    f"a text of segment {index} holds control characters; "
                    "only tab, line feed and carriage return are allowed"
                )
        return segments

    def profile(self, agent: str, version: int) -> Profile:
        """Return it as a version of an agent."""
        text = {name: getattr(self, name) for name in ProfileText.model_fields}
        # What was wrong with it was said where it was read.
        return Profile.model_construct(agent=agent, version=version, **text)

    def check(self, limits: ProfilesGroup) -> None:
        """Raise InvalidRequest if there is more of it than the settings allow."""
        size = sum(len(text.encode()) for segment in self.segments for text in _texts(segment))
        problems = [
            f"there are {count} {what}; at most {limit} are allowed"
            for count, limit, what in (
                (len(self.segments), limits.max_segments, "segments"),
                (size, limits.max_text_bytes, "bytes of text"),
            )
            if count > limit
        ]
        if problems:
            errors = [{"field": "segments", "message": problem} for problem in problems]
            raise InvalidRequest("the request is not valid: segments", errors=errors)


class Draft(ProfileText, Warmed):
    """A profile's text, and what is to be done with it."""

    activate: bool = Field(default=False, description="Make it the active version in the same step.")


class NewAgent(Draft):
    """An agent that there is none of yet."""

    agent: AgentName


class NewVersion(Draft):
    """Another version of an agent that there is."""

    base_version: VersionNumber | None = Field(
        default=None, description="The newest version as you know it; refused if there is a newer one."
    )


class ActivateVersion(Warmed):
    """Which version is to be the active one."""

    version: VersionNumber
    rebase: bool = Field(
        default=False,
        description="If its base has moved on: add a version with the same text on the base as it is now, and activate that.",
    )


class RollBack(Warmed):
    """Which version is to be active again."""

    version: VersionNumber | None = Field(default=None, description="Left out, the one that was active before.")


class NewCanary(Warmed):
    """A version that is to run beside the active one."""

    version: VersionNumber
    share: float = Field(ge=0, le=1, description="Of the agent's requests, from 0 to 1.")


class Promotion(Warmed):
    """That the canary is to be active."""


class NewPin(Because):
    """How many workers are to keep the active version computed."""

    copies: int = Field(default=1, ge=1, le=MAX_COPIES, description="Workers that have it; fewer if fewer are there.")


class ProfileFile(ProfileText):
    """A profile as a YAML file holds it. `version` is where it came from; what is imported gets a number of its own."""

    agent: AgentName
    version: VersionNumber = 1


def _texts(segment: Any) -> tuple[str, ...]:
    if isinstance(segment, Segment):
        return (segment.text,)
    assert isinstance(segment, FewShot)  # noqa: S101  there are no others
    return tuple(said for example in segment.examples for said in (example.user, example.assistant))
