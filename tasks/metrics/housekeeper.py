"""What a housekeeper tells: its rounds, and what it found lost."""

from __future__ import annotations

from tasks.metrics.making import HOUSEKEEPER, counter, gauge, histogram

_AGE_S = (2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0)

LEADER = gauge(
    HOUSEKEEPER, "metaqore_housekeeping_leader", "1 while this housekeeper leads and gets its chores done, else 0."
)
ROUNDS = counter(
    HOUSEKEEPER, "metaqore_housekeeping_rounds_total", "Rounds of chores, by how they ended.", ("outcome",)
)
OUTBOX = histogram(
    HOUSEKEEPER,
    "metaqore_housekeeping_outbox_seconds",
    "Age of accepted requests when they were found missing in Redis and queued again.",
    _AGE_S,
)
OPEN_REQUESTS = gauge(
    HOUSEKEEPER,
    "metaqore_housekeeping_open_requests",
    "Requests that have not ended, by their state in SQL, as of the last whole walk through them.",
    ("state",),
)
OLDEST_OPEN = gauge(
    HOUSEKEEPER,
    "metaqore_housekeeping_oldest_open_seconds",
    "Age of the oldest request that has not ended, as of the last whole walk; 0 if all have.",
)

_ROUNDS = {outcome: ROUNDS.labels(outcome) for outcome in ("led", "stood_by", "queue_away", "database_away", "failed")}


def ended(outcome: str) -> None:
    """Count a round, by how it ended."""
    _ROUNDS[outcome].inc()
    LEADER.set(outcome == "led")
