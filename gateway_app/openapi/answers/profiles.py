"""The answers of `/v1/profiles`."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from gateway_app.openapi.operation import Answer, sometimes
from tasks.prompts.profile import Segment, SegmentKind

Source = Literal["file", "api"]


class ProfileOverview(Answer):
    """An agent. What is null is not there until one of its versions is active."""

    agent: str
    description: str
    source: Source
    active_version: int | None
    newest_version: int
    version_count: int
    static_profile_hash: str | None
    static_token_count: int | None


class ProfilePage(Answer):
    """Agents, by name."""

    data: list[ProfileOverview]
    has_more: bool


class VersionEntry(Answer):
    """A version without its text. What is null was not recorded, or not worked out yet."""

    version: int
    source: Source
    description: str
    created_at: AwareDatetime | None
    created_by: str | None
    static_profile_hash: str | None
    static_token_count: int | None
    joinable: bool | None


class Version(VersionEntry):
    """A version with its text."""

    agent: str
    segments: list[Segment]


class ProfileDocument(ProfileOverview):
    """An agent with all its versions, the newest first, and the active one's text."""

    activated_at: AwareDatetime | None
    versions: list[VersionEntry]
    active: Version | None


class Activation(Answer):
    """What is active now, and how long the shortest prompt with it is."""

    agent: str
    active_version: int
    previous_version: int | None
    static_profile_hash: str
    static_token_count: int
    joinable: bool
    least_prompt_tokens: int
    context_window: int


class ProfileChange(Answer):
    """One segment that differs, as a unified diff."""

    kind: SegmentKind
    change: Literal["added", "removed", "changed"]
    old_index: int | None
    new_index: int | None
    lines_added: int
    lines_removed: int
    diff: str


class ProfileDiff(Answer):
    """How two versions differ. Segments that are equal at the start share their KV cache."""

    agent: str
    from_: int = Field(alias="from")
    to: int
    shared_segments: int
    description_changed: bool
    changes: list[ProfileChange]
    text: str = sometimes("All diffs, one after the other.")
