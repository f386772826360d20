"""Two versions of one agent side by side: which a request gets, and how each of them does.

The request's id decides. Its hash, together with agent and version, is a number from 0 to 1 that is as good as drawn by
lot, and a request goes to the canary if that is below the share. So the share is exact in expectation, the choice can be
checked afterwards from the record alone, and another canary draws other lots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.db import Database
from tasks.schema import TERMINAL_KINDS, audit_events

_RANGE = 2**64
_TOKENS = ("prompt_tokens", "cached_tokens", "output_tokens")


def gets_canary(agent: str, version: int, share: float, request_id: str) -> bool:
    """Tell whether the request gets the canary; `version` is 0 for the shipped file."""
    digest = hashlib.sha256(f"{agent}\n{version}\n{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * _RANGE


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of the requests that one version got. Tokens are sums over those that ended.

    `first_token_ms` is the median in milliseconds, None as long as no request had a first token.
    """

    version: int
    requests: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    dead: int = 0
    vetoed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token_ms: float | None = None


class CanaryFigures:
    """Counts from the audit events, so that the figures are what an auditor would count."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def since(self, organization: str, agent: str, versions: Collection[int], start: datetime) -> list[Figures]:
        """Return the figures of each version, of requests that were admitted from `start` on."""
        return self._database.read(lambda connection: _figures(connection, organization, agent, versions, start))


def _figures(
    connection: Connection, organization: str, agent: str, versions: Collection[int], start: datetime
) -> list[Figures]:
    admitted, ended = audit_events.alias("admitted"), audit_events.alias("ended")
    theirs = (
        admitted.c.organization == organization,
        admitted.c.occurred_at >= start,
        admitted.c.kind == _literal("admitted"),
        admitted.c.agent_name == agent,
        admitted.c.profile_version.in_(versions),
    )
    terminal = ended.c.kind.in_([_literal(kind) for kind in TERMINAL_KINDS])
    same = sa.and_(ended.c.request_id == admitted.c.request_id, terminal)
    both = admitted.outerjoin(ended, same)
    of_version = admitted.c.profile_version.label("version")
    counts = [sa.func.count(sa.case((ended.c.kind == kind, 1))).label(kind) for kind in TERMINAL_KINDS]
    sums = [sa.func.coalesce(sa.func.sum(ended.c[name]), 0).label(name) for name in _TOKENS]
    query = sa.select(of_version, sa.func.count().label("requests"), *counts, *sums).select_from(both)
    found = {row.version: row for row in connection.execute(query.where(*theirs).group_by(of_version))}
    # Ranked among those of their version; the middle one, of two the lower.
    rank = sa.func.row_number().over(partition_by=of_version, order_by=ended.c.first_token_ms)
    many = sa.func.count().over(partition_by=of_version)
    timed = sa.select(of_version, ended.c.first_token_ms.label("ms"), rank.label("rank"), many.label("many"))
    ranked = timed.select_from(both).where(*theirs, ended.c.first_token_ms.is_not(None)).subquery()
    middle = sa.select(ranked.c.version, ranked.c.ms).where(ranked.c.rank == (ranked.c.many + 1) // 2)
    medians: dict[int, float] = {row.version: row.ms for row in connection.execute(middle)}
    return [_of(version, found.get(version), medians.get(version)) for version in versions]


def _literal(kind: str) -> sa.ColumnElement[str]:
    """Return a kind written out, so that the indices for it are taken."""
    return sa.literal_column(f"'{kind}'")


def _of(version: int, row: Any, median: float | None) -> Figures:
    if row is None:
        return Figures(version)
    counted = {name: int(getattr(row, name)) for name in ("requests", *TERMINAL_KINDS, *_TOKENS)}
    return Figures(version, **counted, first_token_ms=median)
