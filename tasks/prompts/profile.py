"""Agent profiles: what an agent always is, as ordered segments, written in YAML.

Segments go from the most widely shared to the most specific (`agent_base_profile`, `role`, `tools`), so that agents
with a common base share a common prefix, which is what the KV cache can reuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from tasks.errors import ProfileError
from tasks.job import Frozen, Name

SegmentKind = Literal["agent_base_profile", "role", "tools"]
_ORDER: tuple[SegmentKind, ...] = ("agent_base_profile", "role", "tools")
SEPARATOR = "\n\n"
MAX_FILE_BYTES = 2**20


class Segment(Frozen):
    """One part of a profile's text."""

    kind: SegmentKind
    text: str = Field(min_length=1)


class Profile(Frozen):
    """An agent's static part, in one version."""

    agent: Name
    version: int = Field(ge=1)
    description: str = Field(default="", max_length=500)
    segments: tuple[Segment, ...] = Field(min_length=1, strict=False)

    @field_validator("segments")
    @classmethod
    def _static_first(cls, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        ranks = [_ORDER.index(segment.kind) for segment in segments]
        if ranks != sorted(ranks):
            raise ValueError(f"segments must come in the order {', '.join(_ORDER)}")
        return segments

    @property
    def text(self) -> str:
        """Return the whole static text: the segments, joined by blank lines."""
        return SEPARATOR.join(segment.text.strip("\n") for segment in self.segments)


def read_profile(path: Path) -> Profile:
    """Read one profile. Raises ProfileError, naming the file and each field that is wrong."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProfileError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        content = yaml.safe_load(path.read_text("utf-8"))
        return Profile.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'profile'}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)
        )
        raise ProfileError(f"{path}: {problems}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"{path}: {error}") from None


def read_profiles(directory: Path) -> dict[str, Profile]:
    """Read every `*.yaml` in `directory`, by agent name. Raises ProfileError if two name the same agent."""
    if not directory.is_dir():
        raise ProfileError(f"{directory} is not a folder; governance.profiles_directory must be one")
    profiles: dict[str, Profile] = {}
    for path in sorted(directory.glob("*.yaml")):
        profile = read_profile(path)
        if profile.agent in profiles:
            raise ProfileError(f"{path}: another file already defines agent {profile.agent!r}")
        profiles[profile.agent] = profile
    return profiles
