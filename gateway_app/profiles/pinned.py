"""What is pinned, as SQL has it: the statements, and what an agent's row says of its pin."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.profiles.rows import Agent
from gateway_app.profiles.wishes import Wanted
from tasks.prompts.chain import stored_chain
from tasks.schema import profiles as static_parts
from tasks.schema_profiles import agents


def copies(agent: Agent | None) -> int:
    """Return how many copies are kept warm of an agent, 0 if it is not pinned."""
    return (agent.pinned_copies if agent is not None else None) or 0


def hashes_of(agent: Agent | None) -> tuple[str, ...]:
    """Return the hash of what is kept warm of an agent, if it is pinned."""
    return (agent.pinned_hash,) if agent is not None and agent.pinned_hash is not None else ()


def count_pinned(connection: Connection, organization: str) -> int:
    """Return how many agents the organization has pinned."""
    query = sa.select(sa.func.count()).select_from(agents)
    pinned = agents.c.pinned_copies.is_not(None)
    return int(connection.execute(query.where(agents.c.organization == organization, pinned)).scalar_one())


def pinned_parts(
    connection: Connection, organization: str | None = None, hashes: Collection[str] | None = None
) -> list[tuple[Wanted, int]]:
    """Return what is to be kept warm, with how many copies: all of it, or what an organization pinned of these hashes."""
    parts = static_parts.c
    pinned = agents.c.pinned_copies.is_not(None)
    query = sa.select(
        parts.organization, parts.static_profile_hash, parts.static_token_count, parts.chain, agents.c.pinned_copies
    ).select_from(agents.join(static_parts, parts.static_profile_hash == agents.c.pinned_hash))
    query = query.where(pinned, agents.c.retired_at.is_(None), parts.static_token_count > 0)
    if organization is not None:
        query = query.where(agents.c.organization == organization)
    if hashes is not None:
        query = query.where(agents.c.pinned_hash.in_(hashes))
    found: dict[str, tuple[Wanted, int]] = {}
    for row in connection.execute(query):
        chain = stored_chain(row.chain)
        wanted = Wanted(row.organization, row.static_profile_hash, row.static_token_count, chain)
        # Two agents with the same text have the same static part.
        _, most = found.get(row.static_profile_hash, (wanted, 0))
        found[row.static_profile_hash] = wanted, max(most, row.pinned_copies)
    return list(found.values())
