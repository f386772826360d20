"""Reading an organization's own agents and versions. Each read is one query, by key or in the order of a key."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from gateway_app.profiles import rows
from gateway_app.profiles.rows import Agent, Tokenised
from gateway_app.profiles.sealing import Stored, Version, VersionSealer
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.db_statements import Statement
from tasks.schema_profiles import agents, profile_versions

#: It is run with every request that names an agent.
_AGENT = Statement(
    sa.select(agents).where(
        agents.c.organization == sa.bindparam("organization"), agents.c.agent_name == sa.bindparam("agent")
    )
)
_WITHOUT_TEXT = [column for column in profile_versions.c if column.name not in ("segments", "inherited")]
_ACTIVE = sa.and_(
    profile_versions.c.organization == agents.c.organization,
    profile_versions.c.agent_name == agents.c.agent_name,
    profile_versions.c.version == agents.c.active_version,
)


class ProfileStore:
    """What organizations made, as it is in the database now."""

    def __init__(self, database: Database, keys: KeyWrapper) -> None:
        self._database = database
        self._sealer = VersionSealer(keys)

    def agent(self, organization: str, agent: str) -> Agent | None:
        """Return the agent, if the organization made or changed it."""
        row = self._database.row(_AGENT, {"organization": organization, "agent": agent})
        return None if row is None else rows.as_agent(row)

    def agents(self, organization: str, after: str, limit: int) -> list[tuple[Agent, Version | None]]:
        """Return up to `limit` agents whose names come after `after`, in order, each with its active version."""
        query = sa.select(agents).where(agents.c.organization == organization, agents.c.agent_name > after)
        found = [rows.as_agent(row) for row in self._all(query.order_by(agents.c.agent_name).limit(limit))]
        numbers = [(agent.agent_name, agent.active_version) for agent in found if agent.active_version is not None]
        key = sa.tuple_(profile_versions.c.agent_name, profile_versions.c.version)
        active = sa.select(*_WITHOUT_TEXT).where(profile_versions.c.organization == organization, key.in_(numbers))
        versions = {row.agent_name: self._sealer.version(row) for row in (self._all(active) if numbers else ())}
        return [(agent, versions.get(agent.agent_name)) for agent in found]

    def callable_names(self, organization: str) -> list[tuple[str, datetime, bool]]:
        """Return the agents that the organization changed, with when they were made.

        Of each it is told whether requests get a version of the organization's own; where they do not, they get
        nothing, the file's version notwithstanding. Those that follow the file are left out.
        """
        own = sa.and_(agents.c.retired_at.is_(None), profile_versions.c.abstract.is_(sa.false()))
        query = sa.select(agents.c.agent_name, agents.c.created_at, own.label("own"))
        query = query.select_from(agents.outerjoin(profile_versions, _ACTIVE)).where(
            agents.c.organization == organization,
            sa.or_(agents.c.active_version.is_not(None), agents.c.retired_at.is_not(None)),
        )
        return [(row.agent_name, row.created_at, bool(row.own)) for row in self._all(query)]

    def children(self, organization: str, base: str) -> list[tuple[str, Version]]:
        """Return the agents whose active version extends `base`, in order, with that version."""
        query = sa.select(*_WITHOUT_TEXT).select_from(agents.join(profile_versions, _ACTIVE))
        query = query.where(agents.c.organization == organization, profile_versions.c.extends == base)
        found = self._all(query.order_by(agents.c.agent_name))
        return [(row.agent_name, self._sealer.version(row)) for row in found]

    def versions(self, organization: str, agent: str) -> list[Version]:
        """Return the agent's versions, newest first."""
        query = sa.select(*_WITHOUT_TEXT).where(*_of(profile_versions, organization, agent))
        return [self._sealer.version(row) for row in self._all(query.order_by(profile_versions.c.version.desc()))]

    def find(self, organization: str, agent: str, version: int) -> Stored | None:
        """Return one version with its text."""
        this = profile_versions.c.version == version
        found = self._all(sa.select(profile_versions).where(*_of(profile_versions, organization, agent), this))
        return self._sealer.stored(found[0]) if found else None

    def remember(self, organization: str, agent: str, version: int, outcome: Tokenised) -> None:
        """Keep what tokenising a version gave."""
        self._database.write(lambda connection: rows.set_tokenised(connection, organization, agent, version, outcome))

    def _all(self, query: sa.Select[Any]) -> list[Row[Any]]:
        return self._database.read(lambda connection: list(connection.execute(query)))


def _of(table: sa.Table, organization: str, agent: str) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.organization == organization, table.c.agent_name == agent
