"""The profiles that workers may hold in their caches, as they are stored for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.schema import profiles

#: Hashes that are looked up in one query.
_AT_ONCE = 500
_COLUMNS = [
    profiles.c[name]
    for name in ("static_profile_hash", "organization", "agent_name", "version", "static_token_count", "chain")
]


class Inner(NamedTuple):
    """A segment inside a profile that others may share: its link, its end in tokens, and its kind."""

    link: str
    tokens: int
    kind: str


@dataclass(frozen=True, slots=True)
class Stored:
    """A profile with `tokens` static tokens. What several agents, or versions, say is stored once, under one's name."""

    static_profile_hash: str
    organization: str
    agent: str
    version: int
    tokens: int
    chain: tuple[Inner, ...]

    @property
    def links(self) -> list[str]:
        """Return the links under which workers report what they hold of it."""
        return [*(inner.link for inner in self.chain), self.static_profile_hash]


def find(connection: Connection, hashes: Sequence[str]) -> list[Stored]:
    """Return the profiles with these hashes that are stored and have a static part, whosever they are."""
    found = []
    for begin in range(0, len(hashes), _AT_ONCE):
        these = profiles.c.static_profile_hash.in_(hashes[begin : begin + _AT_ONCE])
        query = sa.select(*_COLUMNS).where(these, profiles.c.static_token_count > 0)
        found += [_stored(row) for row in connection.execute(query)]
    return found


def _stored(row: Row[Any]) -> Stored:
    chain = tuple(Inner(*inner) for inner in row.chain or ())
    return Stored(row.static_profile_hash, row.organization, row.agent_name, row.version, row.static_token_count, chain)
