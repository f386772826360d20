"""The answer of `/v1/cache`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gateway_app.openapi.operation import Answer, sometimes
from tasks.prompts.profile import SegmentKind


class CacheCopy(Answer):
    """What one worker holds, in tokens: of those on the disk, so many in RAM or on the GPU, and so many on the GPU."""

    worker: str
    tier: Literal["gpu", "ram", "disk", "part"] = Field(
        description="The fastest memory with all of it; `part`: none has all."
    )
    gpu_tokens: int
    ram_tokens: int
    disk_tokens: int


class CacheEntry(Answer):
    """A profile, or a segment that several of the profiles on this page share."""

    type: Literal["segment", "profile"]
    link: str = Field(description="A profile's `static_profile_hash`, or the first half of a segment's hash.")
    parent: str | None = Field(description="The link of the segment that this goes on from.")
    depth: int = Field(description="How many segments there are above it.")
    kinds: list[SegmentKind] = Field(
        description="The kinds of the segments that end here, after the parent's; without a profile's own last one."
    )
    tokens: int = Field(description="From the beginning of a prompt to the end of this.")
    profiles: int = Field(description="How many profiles of this page have it.")
    requests: int = Field(description="That asked for it, in this hour of the clock and the one before.")
    hits: int = Field(description="Of these, how many found all of it cached, as far as it fills blocks.")
    hit_rate: float | None = Field(description="Of the tokens asked for, the share that was cached; null without any.")
    last_asked_s: float | None = Field(description="Seconds since it was last asked for, if that was in that time.")
    copies: list[CacheCopy] = Field(description="The workers that hold any of it.")
    agent: str = sometimes("Of a profile; those that say the same have the same link.")
    version: int = sometimes()


class CacheWorker(Answer):
    """A worker that lives."""

    worker: str
    model: str
    capacity_tokens: int = Field(description="What its KV cache holds on the GPU; 0 if its engine does not tell.")


class CachePage(Answer):
    """Entries, each before those that go on from it."""

    data: list[CacheEntry]
    workers: list[CacheWorker]
    has_more: bool
    next: str | None = Field(description="What to send as `after` for the next page.")
