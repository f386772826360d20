"""The housekeeper's rounds: who leads, what is looked at when, and what happens while Redis or the database is away."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from gateway_app.housekeeping import housekeeper as chores
from gateway_app.housekeeping import walk
from gateway_app.housekeeping.mark import Mark
from tasks.db import now
from tasks.errors import QueueUnavailable
from tasks.idempotency import KEPT
from tasks.schema import idempotency_keys, requests
from tests.gateway_app.housekeeping.conftest import House, MakeHousekeeper
from tests.services import RedisServer, wait_until

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
SOON_S = 20.0


@SQLITE
def test_one_leads(house: House, make_housekeeper: MakeHousekeeper) -> None:
    """The first; the second once the first has resigned, or has been silent for the leader's time."""
    first, second, third = (make_housekeeper() for _ in range(3))
    assert [first.round(), second.round(), first.round()] == [True, False, True]
    assert "housekeeper" not in house.client.get("/readyz").json["missing"]
    first.close()
    ready = house.client.get("/readyz")
    assert (ready.status_code, "housekeeper" in ready.json["missing"]) == (200, True)
    assert "gateway_app.housekeeping" in ready.json["checks"]["housekeeper"]
    assert second.round()
    second_until_ms = house.redis.pttl("metaqore:housekeeper")
    assert 0 < second_until_ms <= 6000
    house.redis.pexpire("metaqore:housekeeper", 1)
    wait_until(third.round, SOON_S, "the third to lead")
    assert not second.round()


@SQLITE
def test_an_empty_redis_is_noticed(
    house: House, make_housekeeper: MakeHousekeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All open requests are looked at in the very next round, however far the walk is, over many pages."""
    monkeypatch.setattr(walk, "PAGE", 3)
    monkeypatch.setattr(chores, "WALK_S", 0.0)
    monkeypatch.setattr(chores, "NEWEST_S", 0.0)
    ids = [house.submit() for _ in range(8)]
    housekeeper = make_housekeeper()
    housekeeper.round()
    assert {house.row(request_id).epoch for request_id in ids} == {1}
    house.redis.flushall()
    housekeeper.round()
    assert all(house.queued(request_id, 2) for request_id in ids)
    assert Mark(house.redis, "metaqore:").whole()
    housekeeper.round()
    assert {house.row(request_id).epoch for request_id in ids} == {2}


@SQLITE
def test_the_walk_goes_on_from_round_to_round(
    house: House, make_housekeeper: MakeHousekeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that nothing tells of is found when the walk comes by; the newest are looked at in every round."""
    monkeypatch.setattr(walk, "PAGE", 2)
    ids = [house.submit() for _ in range(6)]
    housekeeper = make_housekeeper()
    housekeeper.round()
    monkeypatch.setattr(chores, "WALK_S", 0.0)
    lost_early, lost_late = ids[0], ids[-1]
    for lost in (lost_early, lost_late):
        house.publisher.withdraw(f"{lost}:1")
    monkeypatch.setattr(chores, "NEWEST_S", -1.0)
    housekeeper.round()
    assert [house.row(lost).epoch for lost in (lost_early, lost_late)] == [2, 1], "one page a round"
    monkeypatch.setattr(chores, "NEWEST_S", 60.0)
    housekeeper.round()
    assert house.row(lost_late).epoch == 2, "it is among the newest"
    assert {house.row(request_id).epoch for request_id in ids[1:-1]} == {1}


@SQLITE
def test_a_look_at_everything_that_was_cut_short_is_begun_again(
    house: House, make_housekeeper: MakeHousekeeper
) -> None:
    """The leader died in the middle of it: the mark says so to the next one."""
    request_id = house.submit()
    make_housekeeper().round()
    mark = Mark(house.redis, "metaqore:")
    mark.begin()
    assert not mark.whole()
    house.publisher.withdraw(f"{request_id}:1")
    house.redis.delete("metaqore:housekeeper")
    make_housekeeper().round()
    assert mark.whole()
    assert house.queued(request_id, 2)
    mark.remove()
    mark.finish()
    assert not mark.whole(), "what was lost in the middle of a look is not whole at its end"


@SQLITE
def test_redis_away_for_a_while(house: House, make_housekeeper: MakeHousekeeper, own_redis: RedisServer) -> None:
    """The thread goes on; an empty Redis in the place of the old one has all requests again soon after."""
    ids = [house.submit() for _ in range(5)]
    housekeeper = make_housekeeper()
    housekeeper.start()
    wait_until(lambda: "housekeeper" not in house.client.get("/readyz").json["missing"], SOON_S, "a leader")
    own_redis.kill()
    with pytest.raises(QueueUnavailable):
        make_housekeeper().round()
    for file in own_redis.folder.glob("**/*.aof"):
        file.unlink()
    own_redis.start()
    wait_until(lambda: all(house.queued(request_id, 2) for request_id in ids), SOON_S, "every message")
    housekeeper.close()
    assert house.redis.hlen("metaqore:gpu:messages") == len(ids)


def test_what_waited_too_long_is_ended(house: House, make_housekeeper: MakeHousekeeper) -> None:
    """No worker ever looks at it: it ends all the same, and its place in the queue is free."""
    deadline = now() + timedelta(seconds=1)
    late, patient = house.submit(deadline=deadline.isoformat()), house.submit()
    housekeeper = make_housekeeper()
    wait_until(lambda: now() > deadline, SOON_S, "the deadline")
    housekeeper.round()
    assert (house.row(late).state, house.row(patient).state) == ("expired", "queued")
    assert house.kinds(late) == ["received", "admitted", "expired"]
    assert not house.queued(late, 1)
    assert house.publisher.load().requests == 1


def test_old_idempotency_keys_are_forgotten(
    house: House, make_housekeeper: MakeHousekeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, and no younger ones."""
    monkeypatch.setattr("gateway_app.housekeeping.ending.AT_ONCE", 2)
    old, young = now() - KEPT - timedelta(seconds=1), now() - KEPT + timedelta(minutes=1)
    rows = [
        {
            "organization": "default",
            "key_hash": bytes([number]) * 32,
            "body_hash": b"\0" * 32,
            "request_id": f"gw_{number}",
            "created_at": old if number < 5 else young,
        }
        for number in range(7)
    ]
    house.database.write(lambda on: on.execute(sa.insert(idempotency_keys), rows) and None)
    make_housekeeper().round()
    left = house.database.read(lambda on: list(on.execute(sa.select(idempotency_keys.c.request_id)).scalars()))
    assert sorted(left) == ["gw_5", "gw_6"]


@SQLITE
def test_a_fault_does_not_end_the_chores(
    house: House,
    make_housekeeper: MakeHousekeeper,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever goes wrong in a round, the next one comes; the log has the kind of fault and nothing that was stored."""
    housekeeper = make_housekeeper()
    whole = housekeeper.round
    rounds: list[int] = []

    def faulty() -> bool:
        rounds.append(1)
        if len(rounds) == 1:
            raise RuntimeError("a secret prompt")
        return whole()

    monkeypatch.setattr(chores, "ROUND_S", 0.05)
    monkeypatch.setattr(housekeeper, "round", faulty)
    housekeeper.start()
    wait_until(lambda: len(rounds) > 2, SOON_S, "another round")
    housekeeper.close()
    assert "RuntimeError" in caplog.text
    assert "secret prompt" not in caplog.text
    assert house.database.read(lambda on: on.execute(sa.select(sa.func.count()).select_from(requests)).scalar()) == 0
