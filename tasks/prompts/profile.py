"""Agent profiles: what an agent always is, as ordered segments.

Segments go from the most widely shared to the most specific (`agent_base_profile`, `role`, `tools`, `few_shot`), so
that agents with a common base share a common prefix, which is what the KV cache can reuse. The first three are text,
and together the system message; `few_shot` holds exchanges that went well, which become messages after it.

A profile may extend another: that one's segments then go before its own (gateway_app/profiles/inheritance.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from tasks.errors import ProfileError
from tasks.job import Frozen, Name
from tasks.prompts.profile_yaml import MAX_FILE_BYTES, BadYaml, load

TextKind = Literal["agent_base_profile", "role", "tools"]
SegmentKind = Literal["agent_base_profile", "role", "tools", "few_shot"]
ORDER: tuple[SegmentKind, ...] = get_args(SegmentKind)
SEPARATOR = "\n\n"


class Segment(Frozen):
    """One part of a profile's text."""

    kind: TextKind
    text: str = Field(min_length=1)

    @property
    def content(self) -> bytes:
        """Return what the hash chain knows it by."""
        return self.text.encode()


class Example(Frozen):
    """One exchange that went well."""

    user: str = Field(min_length=1)
    assistant: str = Field(min_length=1)


class FewShot(Frozen):
    """Exchanges that the model is shown as messages, before the caller's own."""

    kind: Literal["few_shot"]
    examples: tuple[Example, ...] = Field(min_length=1, strict=False)

    @property
    def text(self) -> str:
        """Return the exchanges as text, for people and for comparing."""
        return "".join(f"user:\n{example.user}\nassistant:\n{example.assistant}\n" for example in self.examples)

    @property
    def content(self) -> bytes:
        """Return what the hash chain knows it by: JSON, in which no border can be shifted."""
        pairs = [[example.user, example.assistant] for example in self.examples]
        return json.dumps(pairs, ensure_ascii=False, separators=(",", ":")).encode()


def _shape(value: Any) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    if not isinstance(kind, str) or kind not in ORDER:
        return None
    return "examples" if kind == "few_shot" else "text"


#: Told apart by kind. The error for an unknown one does not repeat it, as pydantic's own would.
AnySegment: TypeAlias = Annotated[
    Annotated[Segment, Tag("text")] | Annotated[FewShot, Tag("examples")],
    Discriminator(
        _shape, custom_error_type="segment_kind", custom_error_message=f"kind must be one of {', '.join(ORDER)}"
    ),
]


class Profile(Frozen):
    """An agent's static part, in one version. One that is `abstract` is only there to be extended."""

    agent: Name
    version: int = Field(ge=1)
    description: str = Field(default="", max_length=500)
    extends: Name | None = None
    abstract: bool = False
    segments: tuple[AnySegment, ...] = Field(min_length=1, strict=False)

    @field_validator("segments")
    @classmethod
    def _static_first(cls, segments: tuple[AnySegment, ...]) -> tuple[AnySegment, ...]:
        if not in_order(segments):
            raise ValueError(f"segments must come in the order {', '.join(ORDER)}")
        return segments

    @model_validator(mode="after")
    def _extends_another(self) -> Profile:
        if self.extends == self.agent:
            raise ValueError("a profile cannot extend itself")
        return self

    @property
    def text(self) -> str:
        """Return the whole system message: the segments of text, joined by blank lines; empty if there are none."""
        return SEPARATOR.join(item.text.strip("\n") for item in self.segments if isinstance(item, Segment))

    @property
    def examples(self) -> tuple[Example, ...]:
        """Return the exchanges of all segments, in order."""
        return tuple(one for item in self.segments if isinstance(item, FewShot) for one in item.examples)

    def beginnings(self, most: int) -> tuple[Profile, ...]:
        """Return what other profiles may begin with too: its first segment, its first two, and so on, up to `most`."""
        counts = range(1, min(most + 1, len(self.segments)))
        return tuple(self.model_copy(update={"segments": self.segments[:count]}) for count in counts)


def in_order(segments: tuple[AnySegment, ...]) -> bool:
    """Tell whether segments go from the shared to the special."""
    ranks = [ORDER.index(segment.kind) for segment in segments]
    return ranks == sorted(ranks)


def read_profile(path: Path) -> Profile:
    """Read one profile. Raises ProfileError, naming the file and each field that is wrong."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProfileError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        return Profile.model_validate(load(path.read_bytes()))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'profile'}: {item['msg']}"
            for item in error.errors(include_input=False, include_url=False)
        )
        raise ProfileError(f"{path}: {problems}") from None
    except (OSError, BadYaml) as error:
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
