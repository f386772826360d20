"""What every process tells."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from typing import Final

from prometheus_client import Counter

from tasks.errors import AttemptsExhausted, EngineDead, EngineFailed, GatewayError, QueueLost
from tasks.metrics.making import ALL, GOVERNING, POOLED, Reading, counter, gauge, histogram

#: In place of a label's value that is none of those known.
OTHER: Final = "other"
#: Why an attempt may be given back for its worker's sake: codes of audit events that are no errors.
GIVEN_BACK: Final = ("lease_lost", "worker_draining")
_COMMIT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_WRITES = (1, 2, 5, 10, 20, 50, 100, 200)

BUILD = Reading(ALL, "metaqore_build_info", "Always 1: which release this is.", ("process", "version", "python"))
EVENTS = counter(
    ALL,
    "metaqore_audit_events_total",
    "Audit events that this process has committed, by kind and stable code: every admission, refusal, attempt, retry and "
    "end of a request is one.",
    ("kind", "code"),
)
COMMIT = histogram(
    ALL, "metaqore_database_commit_seconds", "How long a group commit took, its statements included.", _COMMIT_S
)
COMMIT_WRITES = histogram(ALL, "metaqore_database_commit_writes", "Writes that shared one group commit.", _WRITES)
COMMIT_LAG = histogram(
    ALL,
    "metaqore_audit_commit_lag_seconds",
    "From when a write, and the audit events in it, was handed over until it was durable: the oldest of each group.",
    _COMMIT_S,
)
COMMITS_FAILED = counter(
    ALL,
    "metaqore_database_commits_failed_total",
    "Group commits that failed because the database was away: `away` before it was told to commit, `undecided` after.",
    ("reason",),
)
UNCOMMITTED = Reading(
    ALL, "metaqore_audit_uncommitted_seconds", "Age of the oldest write that is being committed now; 0 if none is."
)
UNCOMMITTED_WRITES = Reading(ALL, "metaqore_database_uncommitted_writes", "Writes that wait for their commit now.")
DATABASE_POOL = Reading(
    ALL, "metaqore_database_pool_connections", "Connections for reading, by what they do now.", ("state",)
)
DATABASE_POOL_SIZE = Reading(
    ALL, "metaqore_database_pool_size", "Connections for reading that are kept (`database.pool_size`)."
)
REDIS_POOL_IN_USE = Reading(POOLED, "metaqore_redis_pool_in_use", "Connections to Redis that a thread uses now.")
REDIS_POOL_SIZE = Reading(POOLED, "metaqore_redis_pool_size", "Connections to Redis that there may be at once.")
BREAKER_OPEN = gauge(
    GOVERNING,
    "metaqore_governance_breaker_open",
    "1 while the MetaQore server is left alone because it failed again and again, else 0.",
)


def _codes(kind: type[GatewayError] = GatewayError) -> set[str]:
    return {kind.code}.union(*map(_codes, kind.__subclasses__()))


ERROR_CODES: Final = frozenset(_codes())
CODES: Final = ERROR_CODES.union(GIVEN_BACK, {""})


def committed(began: float, handed_over_at: float, writes: int, events: Iterable[tuple[str, str | None]]) -> None:
    """Count a group commit that has just been made, and the kinds and codes of the events in it.

    Of the monotonic clock: when it began, and when the first of its writes was handed over.
    """
    at = time.monotonic()
    COMMIT.observe(at - began)
    COMMIT_LAG.observe(at - handed_over_at)
    COMMIT_WRITES.observe(writes)
    for kind, code in events:
        _events_of(kind, code or "").inc()


@functools.lru_cache(maxsize=1024)
def _events_of(kind: str, code: str) -> Counter:
    return EVENTS.labels(kind, code if code in CODES else OTHER)


# What alerts look for begins at 0: a rate sees nothing of a series that begins at 1.
for _reason in ("away", "undecided"):
    COMMITS_FAILED.labels(_reason)
for _kind, _error in (("dead", AttemptsExhausted), ("dead", QueueLost), ("requeued", QueueLost)):
    _events_of(_kind, _error.code)
for _code in (*GIVEN_BACK, EngineDead.code, EngineFailed.code):
    _events_of("requeued", _code)
