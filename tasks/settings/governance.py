"""Settings of governance: what organizations may have done, who is asked about it, and how the record of it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from tasks.settings.group import ExpandedPath, Group


class GovernanceGroup(Group):
    """Which policy decides where an organization has set none, and where agent profiles are read from."""

    policy: str = Field(default="default_local_first", description="Policy of organizations that name no other.")
    detection: Literal["off", "record", "raise", "refuse"] = Field(
        default="record", description="What such organizations do about private or sensitive data found in a request."
    )
    providers: tuple[Literal["hmcp_gateway", "ollama", "openrouter"], ...] = Field(
        default=("hmcp_gateway",),
        description="Providers that are up. This release runs requests on `hmcp_gateway` only.",
    )
    profiles_directory: ExpandedPath = Path("profiles")


class MetaqoreGroup(Group):
    """The MetaQore server that is asked how a request's project stands; without `url` none is."""

    url: str | None = Field(
        default=None, repr=False, description="Such as http://127.0.0.1:8001; `METAQORE_URL` sets it too."
    )
    mode: Literal["strict", "adaptive", "playground"] | None = Field(
        default=None, description="Governance mode to apply; default: the server's own."
    )
    timeout_s: float = Field(default=2.0, gt=0, le=60, description="Longest wait of one request, all told.")
    cache_s: float = Field(default=5.0, ge=0, le=300, description="How long an answer about a project is used.")
    failure_cache_s: float = Field(default=1.0, ge=0, le=60, description="How long a failure to get one is.")
    cache_projects: int = Field(default=10_000, ge=1, description="Projects whose answers are kept, at most.")
    remember_mode_s: float = Field(
        default=300.0, ge=0, description="How long the server's last known mode holds while it cannot say; then strict."
    )
    breaker_failures: int = Field(default=5, ge=1, description="Failures in a row after which it is left alone.")
    breaker_open_s: float = Field(default=10.0, gt=0, description="For how long; then one request tries again.")
    patience_s: float = Field(
        default=60.0,
        ge=0,
        le=3600,
        description="How long a queued request waits for MetaQore to answer; 0: not at all.",
    )
    connections: int = Field(default=16, ge=1, description="Connections of one process, at most.")
    max_answer_bytes: int = Field(default=4 * 2**20, ge=1024, description="A longer answer is a bad answer.")

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if not value:
            return None
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError("must be http:// or https:// and a host, in ASCII")
        if parts.username is not None or parts.password is not None:
            raise ValueError("must hold no password; the key goes into the secret metaqore_api_key")
        if parts.query or parts.fragment:
            raise ValueError("must hold no query and no fragment")
        return value.rstrip("/")


class ProfilesGroup(Group):
    """What an organization may make of its agents; that a profile fits the model's context window is always asked."""

    max_agents: int = Field(default=1000, ge=1, description="Agents that an organization may make or change.")
    max_versions: int = Field(default=1000, ge=1, description="Own versions of one agent.")
    max_segments: int = Field(default=64, ge=1, description="Segments of one version, without what it inherits.")
    max_text_bytes: int = Field(default=256 * 2**10, ge=1, description="Their text together, in UTF-8.")
    max_depth: int = Field(
        default=4, ge=0, description="Bases that may stand above one another; 0: none may be extended."
    )
    admins_only: bool = Field(default=False, description="Only admin keys may change what requests get; all may draft.")
    warm_copies: int = Field(
        default=1, ge=0, le=64, description="Workers that compute a version before requests get it; 0: none does."
    )
    warm_s: float = Field(
        default=30.0, ge=0, le=600, description="Longest wait for that; then requests get it all the same."
    )
    max_pinned: int = Field(default=20, ge=0, description="Agents of one organization that may be pinned.")


class AuditGroup(Group):
    """The record as others read it: exports, and followers that keep MetaQore's file."""

    follow_interval_s: float = Field(
        default=1.0, gt=0, le=3600, description="How often a follower looks for new events, once it has all there are."
    )
    max_exports: int = Field(default=8, ge=1, description="Exports over HTTP that one web process runs at once.")
