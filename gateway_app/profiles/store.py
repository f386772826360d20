"""Reading an organization's own agents and versions. Each read is one query, by key or in the order of a key."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from gateway_app.profiles import rows
from gateway_app.profiles.rows import Agent, Tokenised
from gateway_app.profiles.sealing import Version, VersionSealer
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.prompts.profile import Profile
from tasks.schema import agents, profile_versions

#: Made once: it is run with every request that names an agent.
_ACTIVE_VERSION = sa.select(agents.c.active_version).where(
    agents.c.organization == sa.bindparam("organization"), agents.c.agent_name == sa.bindparam("agent")
)
_WITHOUT_TEXT = [column for column in profile_versions.c if column.name != "segments"]


class ProfileStore:
    """What organizations made, as it is in the database now."""

    def __init__(self, database: Database, keys: KeyWrapper) -> None:
        self._database = database
        self._sealer = VersionSealer(keys)

    def active_version(self, organization: str, agent: str) -> int | None:
        """Return the number of the active version; None if the organization has none of its own."""
        key = {"organization": organization, "agent": agent}
        return self._database.read(lambda connection: connection.execute(_ACTIVE_VERSION, key).scalar_one_or_none())

    def agent(self, organization: str, agent: str) -> Agent | None:
        """Return the agent, if the organization made or changed it."""
        return self._database.read(lambda connection: rows.find_agent(connection, organization, agent))

    def agents(self, organization: str, after: str, limit: int) -> list[tuple[Agent, Version | None]]:
        """Return up to `limit` agents whose names come after `after`, in order, each with its active version."""
        query = sa.select(agents).where(agents.c.organization == organization, agents.c.agent_name > after)
        found = [rows.as_agent(row) for row in self._all(query.order_by(agents.c.agent_name).limit(limit))]
        numbers = [(agent.name, agent.active_version) for agent in found if agent.active_version is not None]
        key = sa.tuple_(profile_versions.c.agent_name, profile_versions.c.version)
        active = sa.select(*_WITHOUT_TEXT).where(profile_versions.c.organization == organization, key.in_(numbers))
        versions = {row.agent_name: self._sealer.version(row) for row in (self._all(active) if numbers else ())}
        return [(agent, versions.get(agent.name)) for agent in found]

    def active_names(self, organization: str) -> list[tuple[str, datetime]]:
        """Return the agents that have an active version of their own, in order, with when they were made."""
        query = sa.select(agents.c.agent_name, agents.c.created_at).where(
            agents.c.organization == organization, agents.c.active_version.is_not(None)
        )
        return [(row.agent_name, row.created_at) for row in self._all(query.order_by(agents.c.agent_name))]

    def versions(self, organization: str, agent: str) -> list[Version]:
        """Return the agent's versions, newest first."""
        query = sa.select(*_WITHOUT_TEXT).where(*_of(profile_versions, organization, agent))
        return [self._sealer.version(row) for row in self._all(query.order_by(profile_versions.c.version.desc()))]

    def find(self, organization: str, agent: str, version: int) -> tuple[Profile, Version] | None:
        """Return one version with its text."""
        this = profile_versions.c.version == version
        query = sa.select(profile_versions).where(*_of(profile_versions, organization, agent), this)
        found = self._all(query)
        return (self._sealer.profile(found[0]), self._sealer.version(found[0])) if found else None

    def remember(self, organization: str, agent: str, version: int, outcome: Tokenised) -> None:
        """Keep what tokenising a version gave."""
        self._database.write(lambda connection: rows.set_tokenised(connection, organization, agent, version, outcome))

    def _all(self, query: sa.Select[Any]) -> list[Row[Any]]:
        return self._database.read(lambda connection: list(connection.execute(query)))


def _of(table: sa.Table, organization: str, agent: str) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.organization == organization, table.c.agent_name == agent
