"""The statements on agents and their versions. Each runs in the caller's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.db import now
from tasks.schema import profiles
from tasks.schema_profiles import agents, profile_versions


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent that an organization changed. `active_version` None means the shipped file, unless it is retired.

    In `previous_version` and `canary_version`, 0 stands for that file. `canary_share` is from 0 to 1. `pinned_copies`, if the
    agent is pinned, are kept warm of the static part that has the hash `pinned_hash`, that of its active version.
    """

    agent_name: str
    active_version: int | None
    newest_version: int
    version_count: int
    created_at: datetime
    activated_at: datetime | None
    revision: int
    previous_version: int | None
    retired_at: datetime | None
    canary_version: int | None
    canary_share: float | None
    canary_since: datetime | None
    pinned_copies: int | None
    pinned_hash: str | None

    def current(self, shipped: int) -> int | None:
        """Return the active version's number; `shipped` is the file's, 0 if there is none."""
        return None if self.retired_at is not None else self.active_version or shipped or None

    def canary(self, shipped: int) -> int | None:
        """Return the number of the version on trial, if there is one."""
        return self.canary_version if self.canary_version != 0 else shipped or None


class Pin(NamedTuple):
    """A version of a base that another profile's text was taken from."""

    agent: str
    version: int


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


def store_static_part(connection: Connection, row: dict[str, Any]) -> None:
    """Insert a row of `profiles`; one that a gateway of release 0.1.0 made gets its chain."""
    if not insert_once(connection, profiles, row):
        this = sa.and_(profiles.c.static_profile_hash == row["static_profile_hash"], profiles.c.chain.is_(None))
        connection.execute(sa.update(profiles).where(this).values(chain=row["chain"]))


def as_agent(row: Row[Any]) -> Agent:
    """Return the agent in a row that has all columns of `agents`."""
    return Agent(**{name: getattr(row, name) for name in Agent.__slots__})


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
    change_agent(connection, row["organization"], row["agent_name"], counted)


def change_agent(connection: Connection, organization: str, agent: str, values: dict[str, Any]) -> None:
    """Change an agent's row, which counts as a change."""
    values = {**values, "revision": agents.c.revision + 1}
    connection.execute(sa.update(agents).where(_is(agents, organization, agent)).values(values))


def set_active(
    connection: Connection,
    organization: str,
    before: Agent,
    version: int | None,
    by: str,
    shipped: int,
    static_profile_hash: str,
) -> None:
    """Make the version the active one from the commit on, and end a trial; None stands for the shipped file.

    `before` is the agent as it is locked, `shipped` the file's number, 0 if there is none. A pin goes over to the version.
    """
    at = now()
    replaced = before.current(shipped) is not None and before.active_version != version
    previous = before.active_version or 0 if replaced else before.previous_version
    values = {"active_version": version, "activated_at": at, "activated_by": by, "retired_at": None}
    values |= {"previous_version": previous, "canary_version": None, "canary_share": None, "canary_since": None}
    if before.pinned_copies is not None:
        values["pinned_hash"] = static_profile_hash
    change_agent(connection, organization, before.agent_name, values)
    set_used(connection, organization, before.agent_name, version, at)


def set_used(connection: Connection, organization: str, agent: str, version: int | None, at: datetime) -> None:
    """Keep that requests get the version from now on; the shipped file has no row for it."""
    if version is not None:
        this = sa.and_(_is(profile_versions, organization, agent), profile_versions.c.version == version)
        connection.execute(sa.update(profile_versions).where(this).values(activated_at=at))


def pin(
    connection: Connection, organization: str, agent: str, version: int, pins: tuple[Pin, ...], inherited: bytes
) -> bool:
    """Say once and for all what the version inherits; return False if that was said before."""
    this = sa.and_(_is(profile_versions, organization, agent), profile_versions.c.version == version)
    unpinned = sa.update(profile_versions).where(this, profile_versions.c.inherited.is_(None))
    values = {"pins": [list(each) for each in pins], "inherited": inherited}
    return connection.execute(unpinned.values(values)).rowcount == 1


def set_usable(
    connection: Connection, organization: str, agent: str, version: int, outcome: Tokenised, worker_row: dict[str, Any]
) -> None:
    """Keep what tokenising the version gave, also for the workers."""
    set_tokenised(connection, organization, agent, version, outcome)
    store_static_part(connection, {**worker_row, "version": version})


def set_tokenised(connection: Connection, organization: str, agent: str, version: int, outcome: Tokenised) -> None:
    """Keep what tokenising the version gave."""
    values = {name: getattr(outcome, name) for name in Tokenised.__slots__}
    this = sa.and_(_is(profile_versions, organization, agent), profile_versions.c.version == version)
    connection.execute(sa.update(profile_versions).where(this).values(values))


def _is(table: sa.Table, organization: str, agent: str) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.organization == organization, table.c.agent_name == agent)
