"""The answers of `/v1/profiles`."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from gateway_app.openapi.operation import Answer, sometimes
from gateway_app.profiles.history import Action
from gateway_app.profiles.warming import Why
from tasks.prompts.profile import AnySegment, SegmentKind

Source = Literal["file", "api"]


class Pin(Answer):
    """A version that what is inherited was taken from."""

    agent: str
    version: int


class Behind(Answer):
    """A base that has moved on."""

    agent: str
    pinned: int
    active: int


class Canary(Answer):
    """A version on trial beside the active one, and its share of the requests."""

    version: int
    share: float
    since: AwareDatetime


class Warm(Answer):
    """How warm a version was when requests began to get it: wanted copies, and the workers that had it computed."""

    copies: int
    workers: list[str]
    waited_s: float
    why: Why | None = Field(description="Why there are fewer than were wanted; null if there are not.")


class PinState(Answer):
    """Copies of an agent's active version that are kept warm; 0 if it is not pinned.

    `workers` have one, `computing` are computing one; null if nothing is active, the version was never used with the model that is
    served now, or the queue does not answer.
    """

    agent: str
    copies: int
    active_version: int | None
    static_profile_hash: str | None
    workers: list[str] | None
    computing: list[str] | None


class ProfileOverview(Answer):
    """An agent. What is null is not there until one of its versions is active."""

    agent: str
    description: str
    source: Source
    abstract: bool
    retired: bool
    pinned_copies: int = Field(description="Copies of the active version that are kept warm; 0: it is not pinned.")
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
    state: Literal["draft", "active", "canary", "retired"]
    description: str
    extends: str | None
    abstract: bool
    pins: list[Pin] | None = Field(
        description="What its inherited text is of, the nearest first; settled with first use."
    )
    created_at: AwareDatetime | None
    created_by: str | None
    author: str | None
    reason: str | None
    activated_at: AwareDatetime | None
    static_profile_hash: str | None
    static_token_count: int | None
    joinable: bool | None


class Version(VersionEntry):
    """A version with its own text; what it inherits is shown by the versions it is pinned to."""

    agent: str
    segments: list[AnySegment]
    warm: Warm = sometimes("Where it was to be active at once.")


class ProfileDocument(ProfileOverview):
    """An agent with all its versions, the newest first, and the active one's text."""

    previous_version: int | None = Field(description="What a rollback leads to.")
    activated_at: AwareDatetime | None
    retired_at: AwareDatetime | None
    canary: Canary | None
    behind: Behind | None = Field(description="Set if the active version's base has another active version by now.")
    children_behind: list[str] = Field(description="Agents whose active version extends another version of this one.")
    versions: list[VersionEntry]
    active: Version | None
    warm: Warm = sometimes("Where its first version was to be active at once.")


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
    warm: Warm | None
    children_behind: list[str] = Field(description="Agents that still extend another version of this one.")


class Retired(Answer):
    """An agent that is out of use."""

    agent: str
    retired: Literal[True]
    previous_version: int | None


class VersionFigures(Answer):
    """What became of the requests that one version got, and the tokens of those that ended."""

    version: int
    requests: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    dead: int
    vetoed: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token_ms: float | None = Field(description="The median, in milliseconds.")


class CanaryFigures(Canary):
    """A canary and the active version, side by side since the canary began."""

    agent: str
    active: VersionFigures
    canary: VersionFigures
    warm: Warm = sometimes("Where the canary was just set.")


class CanaryStopped(Answer):
    """An agent without a canary."""

    agent: str
    canary: None


class HistoryEntry(Answer):
    """A change, as the audit has it. `from` and `to` are active versions, or canaries where it is about them."""

    id: str
    at: AwareDatetime
    by: str = Field(description="The API key's id.")
    action: Action
    from_: int | None = Field(alias="from")
    to: int | None
    author: str | None
    reason: str | None
    share: float | None
    canary_ended: int | None
    rebased_from: int | None
    copies: int | None = Field(description="Of a pin.")
    pins: list[Pin] | None
    static_profile_hash: str | None


class HistoryPage(Answer):
    """Changes, the newest first."""

    data: list[HistoryEntry]
    has_more: bool


class ProfileChange(Answer):
    """One segment that differs, as a unified diff."""

    kind: SegmentKind
    change: Literal["added", "removed", "changed"]
    old_index: int | None
    new_index: int | None
    lines_added: int
    lines_removed: int
    diff: str


class Difference(Answer):
    """How two versions differ. Segments that are equal at the start share their KV cache."""

    shared_segments: int
    description_changed: bool
    inheritance_changed: bool
    changes: list[ProfileChange]
    text: str = sometimes("All diffs, one after the other.")


class ProfileDiff(Difference):
    """How two versions of one agent differ."""

    agent: str
    from_: int = Field(alias="from")
    to: int


class ImportedProfile(Answer):
    """What came of a file, or would. `difference` is to the newest version that there was."""

    agent: str
    action: Literal["created", "added", "unchanged"]
    dry_run: bool
    from_version: int
    newest_version: int | None
    version: int | None
    difference: Difference | None
