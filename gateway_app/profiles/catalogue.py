"""What an organization sees of its agents: its own versions over those that were shipped.

The hash and token count of a version are shown if the version was tokenised with the model that is served now. They
are not worked out here: a list must not tokenise a thousand profiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from gateway_app.profiles.changes import state
from gateway_app.profiles.finder import Profiles
from gateway_app.profiles.inheritance import Bases
from gateway_app.profiles.rows import Agent, Pin
from gateway_app.profiles.sealing import Version
from tasks.errors import NotFound
from tasks.prompts.profile import Profile

VersionState = Literal["draft", "active", "canary", "retired"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A version without its text. What is None was not recorded (of a file) or not worked out yet.

    `pins` are the versions that what it inherits is of, the nearest first; None until it is first used.
    """

    version: int
    source: Literal["file", "api"]
    state: VersionState
    description: str
    extends: str | None
    abstract: bool
    pins: tuple[Pin, ...] | None
    created_at: datetime | None = None
    created_by: str | None = None
    author: str | None = None
    reason: str | None = None
    activated_at: datetime | None = None
    static_profile_hash: str | None = None
    static_token_count: int | None = None
    joinable: bool | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """An agent. `active` is None until one of its versions is made active, and if it is retired.

    `row` is None if the organization changed nothing; `shipped` is the number of the file, 0 if there is none.
    """

    agent: str
    active: Entry | None
    row: Agent | None
    shipped: int

    @property
    def newest_version(self) -> int:
        """Return the highest number."""
        return max(self.row.newest_version if self.row else 0, self.shipped)

    @property
    def version_count(self) -> int:
        """Return how many versions there are, with the file's."""
        return (self.row.version_count if self.row else 0) + (1 if self.shipped else 0)

    @property
    def previous_version(self) -> int | None:
        """Return what a rollback leads to."""
        previous = self.row.previous_version if self.row else None
        return self.shipped or None if previous == 0 else previous

    @property
    def tag(self) -> str:
        """Return what names the agent's state."""
        return state(self.row, self.shipped)


class Catalogue:
    """Shows agents and versions. What belongs to another organization is not found."""

    def __init__(self, profiles: Profiles, bases: Bases) -> None:
        self._profiles = profiles
        self._bases = bases

    def page(self, organization: str, after: str, limit: int) -> list[Overview]:
        """Return up to `limit` agents whose names come after `after`, in order of their code points."""
        found = self._profiles.store.agents(organization, after, limit)
        own = {agent.agent_name: (agent, active) for agent, active in found}
        names = sorted(own.keys() | {name for name in self._profiles.shipped if name > after})[:limit]
        base = self._profiles.prefixes.base(organization)
        rows = [(name, own.get(name, (None, None))) for name in names]
        return [self._overview(organization, name, agent, active, base) for name, (agent, active) in rows]

    def show(self, organization: str, agent: str) -> tuple[Overview, list[Entry]]:
        """Return an agent and its versions, newest first. Raises UnknownAgent."""
        row = self._profiles.store.agent(organization, agent)
        if row is None and agent not in self._profiles.shipped:
            raise self._profiles.unknown(organization, agent)
        versions = self._profiles.store.versions(organization, agent) if row else []
        base = self._profiles.prefixes.base(organization)
        active = next((version for version in versions if row and version.number == row.active_version), None)
        entries = [_own_entry(version, row, base) for version in versions]
        if agent in self._profiles.shipped:
            entries.append(self._shipped_entry(organization, agent, row))
        overview = self._overview(organization, agent, row, active, base)
        return overview, sorted(entries, key=lambda entry: -entry.version)

    def overview(self, organization: str, agent: str) -> Overview:
        """Return an agent alone. Raises UnknownAgent."""
        self._profiles.known(organization, agent)
        row = self._profiles.store.agent(organization, agent)
        number = row.active_version if row else None
        active = self._profiles.store.find(organization, agent, number) if number is not None else None
        base = self._profiles.prefixes.base(organization)
        return self._overview(organization, agent, row, active.version if active else None, base)

    def version(self, organization: str, agent: str, version: int) -> tuple[Entry, Profile]:
        """Return one version with its own text; of two with the same number the organization's own. Raises NotFound."""
        found = self._profiles.store.find(organization, agent, version)
        row = self._profiles.store.agent(organization, agent)
        if found is not None:
            return _own_entry(found.version, row, self._profiles.prefixes.base(organization)), found.profile
        if self._profiles.shipped_number(agent) != version:
            raise NotFound(f"there is no version {version} of an agent named {agent!r}")
        return self._shipped_entry(organization, agent, row), self._profiles.shipped[agent]

    def text(self, organization: str, agent: str, entry: Entry) -> Profile:
        """Return the text of a version that this catalogue showed."""
        if entry.source == "file":
            return self._profiles.shipped[agent]
        return self.version(organization, agent, entry.version)[1]

    def behind(self, organization: str, overview: Overview) -> tuple[Pin, int] | None:
        """Return the base's pinned version and its number now, if the active version's base has moved on."""
        return self._bases.behind(organization, overview.active.pins) if overview.active else None

    def children_behind(self, organization: str, agent: str) -> list[str]:
        """Return the agents that extend another version of this one than its active one."""
        return self._bases.children_behind(organization, agent)

    def _overview(self, organization: str, name: str, row: Agent | None, active: Version | None, base: str) -> Overview:
        shipped = self._profiles.shipped_number(name)
        if active is not None:
            return Overview(name, _own_entry(active, row, base), row, shipped)
        follows_file = shipped and (row is None or row.retired_at is None)
        return Overview(name, self._shipped_entry(organization, name, row) if follows_file else None, row, shipped)

    def _shipped_entry(self, organization: str, agent: str, row: Agent | None) -> Entry:
        active, profile = self._profiles.name_shipped(organization, agent), self._profiles.shipped[agent]
        used = row is None or (row.active_version is None and row.retired_at is None)
        return Entry(
            version=profile.version,
            source="file",
            state="active" if used else "canary" if row and row.canary_version == 0 else "retired",
            description=profile.description,
            extends=profile.extends,
            abstract=profile.abstract,
            pins=self._profiles.inherited[agent].pins if profile.extends else None,
            static_profile_hash=active.static_profile_hash,
            static_token_count=active.static_token_count,
            joinable=active.layout.joinable,
        )


def _own_entry(version: Version, row: Agent | None, base: str) -> Entry:
    entry = Entry(
        version=version.number,
        source="api",
        state=_state(version, row),
        description=version.description,
        extends=version.extends,
        abstract=version.abstract,
        pins=version.pins,
        created_at=version.created_at,
        created_by=version.created_by,
        author=version.author,
        reason=version.reason,
        activated_at=version.activated_at,
    )
    known = version.tokenised
    if known is None or known.prefix_base != base:
        return entry
    return replace(
        entry,
        static_profile_hash=known.static_profile_hash,
        static_token_count=known.static_token_count,
        joinable=known.joinable,
    )


def _state(version: Version, row: Agent | None) -> VersionState:
    if row is not None and version.number == row.active_version:
        return "active"
    if row is not None and version.number == row.canary_version:
        return "canary"
    return "draft" if version.activated_at is None else "retired"
