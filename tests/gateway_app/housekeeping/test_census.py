"""What a housekeeper tells: how many requests are open and how old, what it found lost, and how its rounds end."""

from __future__ import annotations

import pytest

from tasks.metrics.making import INSTRUMENTS
from tests.gateway_app.housekeeping.conftest import House, MakeHousekeeper
from tests.services import RedisServer, wait_until

TOLD = INSTRUMENTS["housekeeper"]


@pytest.fixture
def database_kind() -> str:
    """Return SQLite: what a database is like is no matter here."""
    return "sqlite"


def told(name: str, **labels: str) -> float:
    """Return what is told now."""
    return TOLD.get_sample_value(f"metaqore_{name}", labels) or 0.0


def open_requests() -> tuple[float, float]:
    """Return how many requests wait, and run."""
    return tuple(told("housekeeping_open_requests", state=state) for state in ("queued", "running"))  # type: ignore[return-value]


def test_open_requests_are_counted(house: House, make_housekeeper: MakeHousekeeper) -> None:
    """Of the last whole walk: those that wait, that run, and how old the oldest is; by the leader alone."""
    first, second = house.submit(), house.submit()
    house.start(second)
    leader, other = make_housekeeper(), make_housekeeper()
    leader.round()
    assert open_requests() == (1, 1)
    leader.round()
    assert open_requests() == (1, 1)
    assert 0 < told("housekeeping_oldest_open_seconds") < 60
    house.client.delete(f"/v1/tasks/{first}")
    leader.round()
    assert open_requests() == (0, 1)
    other.round()
    assert open_requests() == (0, 0)
    assert told("housekeeping_oldest_open_seconds") == 0


def test_what_was_lost_is_counted(house: House, make_housekeeper: MakeHousekeeper) -> None:
    """Each request that is queued again, with its age, as the audit trail has it."""
    before = told("housekeeping_outbox_seconds_count")
    events = told("audit_events_total", kind="requeued", code="queue_lost")
    for _ in range(3):
        house.submit()
    house.redis.flushall()
    housekeeper = make_housekeeper()
    housekeeper.round()
    housekeeper.round()
    assert told("housekeeping_outbox_seconds_count") - before == 3
    assert told("audit_events_total", kind="requeued", code="queue_lost") - events == 3


def test_rounds_are_counted_by_how_they_end(
    house: House, make_housekeeper: MakeHousekeeper, own_redis: RedisServer
) -> None:
    """And whoever does not get its chores done does not count as the leader."""
    before = {outcome: told("housekeeping_rounds_total", outcome=outcome) for outcome in ("led", "queue_away")}

    def more(outcome: str) -> bool:
        return told("housekeeping_rounds_total", outcome=outcome) > before[outcome]

    housekeeper = make_housekeeper()
    housekeeper.start()
    wait_until(lambda: more("led") and told("housekeeping_leader") == 1, 30, "a round")
    own_redis.kill()
    wait_until(lambda: more("queue_away") and told("housekeeping_leader") == 0, 30, "a round without Redis")
    housekeeper.close()
