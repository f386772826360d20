"""What an organization sees of its agents: its own versions over those that were shipped.

The hash and token count of a version are shown if the version was tokenised with the model that is served now. They
are not worked out here: a list must not tokenise a thousand profiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from gateway_app.profiles.finder import Profiles
from gateway_app.profiles.rows import Agent
from gateway_app.profiles.sealing import Version
from tasks.errors import NotFound
from tasks.prompts.profile import Profile


@dataclass(frozen=True, slots=True)
class Entry:
    """A version without its text. What is None was not recorded (of a file) or not worked out yet."""

    version: int
    source: Literal["file", "api"]
    description: str
    created_at: datetime | None = None
    created_by: str | None = None
    static_profile_hash: str | None = None
    static_token_count: int | None = None
    joinable: bool | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """An agent. `active` is None until one of its versions is made active."""

    agent: str
    active: Entry | None
    newest_version: int
    version_count: int
    activated_at: datetime | None


class Catalogue:
    """Shows agents and versions. What belongs to another organization is not found."""

    def __init__(self, profiles: Profiles) -> None:
        self._profiles = profiles

    def page(self, organization: str, after: str, limit: int) -> list[Overview]:
        """Return up to `limit` agents whose names come after `after`, in order of their code points."""
        own = {agent.name: (agent, active) for agent, active in self._profiles.store.agents(organization, after, limit)}
        names = sorted(own.keys() | {name for name in self._profiles.shipped if name > after})[:limit]
        base = self._profiles.prefixes.base(organization)
        found = [(name, own.get(name, (None, None))) for name in names]
        return [self._overview(organization, name, agent, active, base) for name, (agent, active) in found]

    def show(self, organization: str, agent: str) -> tuple[Overview, list[Entry]]:
        """Return an agent and its versions, newest first. Raises UnknownAgent."""
        row = self._profiles.store.agent(organization, agent)
        if row is None and agent not in self._profiles.shipped:
            raise self._profiles.unknown(organization, agent)
        versions = self._profiles.store.versions(organization, agent) if row else []
        base = self._profiles.prefixes.base(organization)
        active = next((version for version in versions if row and version.number == row.active_version), None)
        entries = [_own_entry(version, base) for version in versions]
        if agent in self._profiles.shipped:
            entries.append(self._shipped_entry(organization, agent))
        overview = self._overview(organization, agent, row, active, base)
        return overview, sorted(entries, key=lambda entry: -entry.version)

    def version(self, organization: str, agent: str, version: int) -> tuple[Entry, Profile]:
        """Return one version; of two with the same number the organization's own. Raises NotFound."""
        found = self._profiles.store.find(organization, agent, version)
        if found is not None:
            profile, stored = found
            return _own_entry(stored, self._profiles.prefixes.base(organization)), profile
        shipped = self._profiles.shipped.get(agent)
        if shipped is None or shipped.version != version:
            raise NotFound(f"there is no version {version} of an agent named {agent!r}")
        return self._shipped_entry(organization, agent), shipped

    def text(self, organization: str, agent: str, entry: Entry) -> Profile:
        """Return the text of a version that this catalogue showed."""
        if entry.source == "file":
            return self._profiles.shipped[agent]
        return self.version(organization, agent, entry.version)[1]

    def _overview(
        self, organization: str, name: str, agent: Agent | None, active: Version | None, base: str
    ) -> Overview:
        shipped = self._profiles.shipped.get(name)
        entry = _own_entry(active, base) if active else self._shipped_entry(organization, name) if shipped else None
        return Overview(
            agent=name,
            active=entry,
            newest_version=max(agent.newest_version if agent else 0, shipped.version if shipped else 0),
            version_count=(agent.version_count if agent else 0) + (1 if shipped else 0),
            activated_at=agent.activated_at if agent else None,
        )

    def _shipped_entry(self, organization: str, agent: str) -> Entry:
        active = self._profiles.name_shipped(organization, agent)
        return Entry(
            version=active.profile.version,
            source="file",
            description=active.profile.description,
            static_profile_hash=active.static_profile_hash,
            static_token_count=active.static_token_count,
            joinable=active.layout.joinable,
        )


def _own_entry(version: Version, base: str) -> Entry:
    entry = Entry(version.number, "api", version.description, version.created_at, version.created_by)
    known = version.tokenised
    if known is None or known.prefix_base != base:
        return entry
    return replace(
        entry,
        static_profile_hash=known.static_profile_hash,
        static_token_count=known.static_token_count,
        joinable=known.joinable,
    )
