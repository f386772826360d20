"""The statements on agents and their versions. Each runs in the caller's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.db import now
from tasks.schema import agents, profile_versions


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent that an organization has versions of its own of. `active_version` None means: the shipped file."""

    name: str
    active_version: int | None
    newest_version: int
    version_count: int
    created_at: datetime
    activated_at: datetime | None


@dataclass(frozen=True, slots=True)
class Tokenised:
    """What tokenising a version gave. It holds for as long as the organization's `prefix_base` is this one."""

    prefix_base: str
    static_profile_hash: str
    static_token_count: int
    joinable: bool


def insert_once(connection: Connection, table: sa.Table, row: dict[str, Any]) -> bool:
    """Insert `row`; return False if one with its key is there already."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    statement = insert(table).values(row).on_conflict_do_nothing()
    return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount == 1


def as_agent(row: Row[Any]) -> Agent:
    """Return the agent in a row that has all columns of `agents`."""
    return Agent(
        row.agent_name, row.active_version, row.newest_version, row.version_count, row.created_at, row.activated_at
    )


def find_agent(connection: Connection, organization: str, agent: str, *, lock: bool = False) -> Agent | None:
    """Return the agent if it has a row; with `lock`, nobody else changes it until the transaction ends."""
    query = sa.select(agents).where(_is(agents, organization, agent))
    # SQLite has no row locks and needs none: its writers take turns.
    row = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return None if row is None else as_agent(row)


def count_agents(connection: Connection, organization: str) -> int:
    """Return how many agents the organization made or changed."""
    query = sa.select(sa.func.count()).select_from(agents).where(agents.c.organization == organization)
    return int(connection.execute(query).scalar_one())


def insert_agent(connection: Connection, organization: str, agent: str) -> bool:
    """Insert an agent without versions; return False if there is one already, perhaps since this moment."""
    row = {"organization": organization, "agent_name": agent, "newest_version": 0, "version_count": 0}
    return insert_once(connection, agents, {**row, "created_at": now()})


def insert_version(connection: Connection, row: dict[str, Any]) -> None:
    """Insert a version, and make it the newest of its agent."""
    connection.execute(sa.insert(profile_versions), row)
    counted = {"newest_version": row["version"], "version_count": agents.c.version_count + 1}
    connection.execute(sa.update(agents).where(_is(agents, row["organization"], row["agent_name"])).values(counted))


def set_active(connection: Connection, organization: str, agent: str, version: int | None, by: str) -> None:
    """Make the version the active one from the commit on; None stands for the shipped file."""
    values = {"active_version": version, "activated_at": now(), "activated_by": by}
    connection.execute(sa.update(agents).where(_is(agents, organization, agent)).values(values))


def set_tokenised(connection: Connection, organization: str, agent: str, version: int, outcome: Tokenised) -> None:
    """Keep what tokenising the version gave."""
    values = {name: getattr(outcome, name) for name in Tokenised.__slots__}
    this = sa.and_(_is(profile_versions, organization, agent), profile_versions.c.version == version)
    connection.execute(sa.update(profile_versions).where(this).values(values))


def _is(table: sa.Table, organization: str, agent: str) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.organization == organization, table.c.agent_name == agent)
