"""What Redis has lost is published again, once, and what it has not is left alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from gateway_app.housekeeping.losses import Losses
from tasks.crypto import KeyWrapper, Signer
from tasks.db import Database
from tasks.errors import QueueUnavailable
from tasks.queueing.message import MessageCodec, Queued
from tasks.queueing.publisher import Publisher
from tasks.settings import settings
from tests.gateway_app.housekeeping.conftest import House

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
PATIENCE_S = 6.0


class Clock:
    """A clock that the test sets, in seconds."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.at


@pytest.fixture
def clock() -> Clock:
    """Return the clock that the losses are judged by."""
    return Clock()


@pytest.fixture
def losses(house: House, clock: Clock) -> Losses:
    """Return what the tests are about."""
    return make_losses(house, house.publisher, clock)


def make_losses(house: House, publisher: Publisher, clock: Callable[[], float], max_publications: int = 20) -> Losses:
    """Return a judge of losses."""
    secrets = settings().secrets
    codec = MessageCodec(Signer(secrets.keys("signing_key")), KeyWrapper(secrets.keys("master_key")))
    return Losses(
        house.database, publisher, codec, max_publications=max_publications, patience_s=PATIENCE_S, clock=clock
    )


@SQLITE
def test_what_is_queued_is_left_alone(house: House, losses: Losses) -> None:
    """Nothing changes for a request whose message waits."""
    request_id = house.submit()
    assert losses.look(house.rows()) == 0
    assert house.row(request_id).epoch == 1
    assert house.kinds(request_id) == ["received", "admitted"]


def test_what_was_queued_is_published_again(house: House, losses: Losses) -> None:
    """The same message under the next epoch, in the list it was in, and the record says why."""
    request_id = house.submit(priority="high")
    lists = house.redis.keys("metaqore:gpu:list:*")
    house.redis.flushall()
    assert losses.look(house.rows()) == 1
    assert house.queued(request_id, 2)
    assert not house.queued(request_id, 1)
    assert (house.row(request_id).state, house.row(request_id).epoch) == ("queued", 2)
    assert house.kinds(request_id) == ["received", "admitted", "requeued"]
    assert house.redis.keys("metaqore:gpu:list:*") == lists
    assert losses.look(house.rows()) == 0


@SQLITE
def test_a_running_request_is_given_time(house: House, losses: Losses, clock: Clock) -> None:
    """Its worker may tell Redis of it again; only when that does not come is it published again."""
    request_id = house.submit()
    house.start(request_id)
    house.redis.flushall()
    assert losses.look(house.rows()) == 0
    clock.at += PATIENCE_S - 0.1
    losses.look_again()
    assert house.row(request_id).epoch == 1
    clock.at += 0.2
    losses.look_again()
    row = house.row(request_id)
    assert (row.state, row.epoch, row.attempt, row.excused) == ("queued", 2, 1, 1)
    assert house.queued(request_id, 2)


@SQLITE
def test_a_running_request_that_is_adopted_again(house: House, losses: Losses, clock: Clock) -> None:
    """Once its worker has told Redis of it, the time begins anew with the next loss."""
    request_id = house.submit()
    house.start(request_id)
    kept = {key: house.redis.dump(key) for key in house.redis.keys("*")}
    house.redis.flushall()
    losses.look(house.rows())
    for key, value in kept.items():
        house.redis.restore(key, 0, value)  # type: ignore[arg-type]
    clock.at += PATIENCE_S + 1
    losses.look_again()
    house.redis.flushall()
    losses.look(house.rows())
    losses.look_again()
    assert house.row(request_id).epoch == 1
    clock.at += PATIENCE_S
    losses.look_again()
    assert house.row(request_id).epoch == 2


@SQLITE
def test_no_worker_is_blamed_while_redis_was_away(house: House, losses: Losses, clock: Clock) -> None:
    """It could not renew anything then, so its time begins when Redis is back."""
    request_id = house.submit()
    house.start(request_id)
    house.redis.flushall()
    losses.look(house.rows())
    clock.at += PATIENCE_S
    losses.forgive()
    losses.look(house.rows())
    assert house.row(request_id).epoch == 1


def test_what_has_moved_on_meanwhile_is_left_alone(house: House, losses: Losses) -> None:
    """It was read as queued; a worker has begun it, another was cancelled, a third has been published again."""
    begun, cancelled, again = (house.submit() for _ in range(3))
    rows = house.rows()
    house.redis.flushall()
    house.start(begun)
    assert house.client.delete(f"/v1/tasks/{cancelled}").status_code == 200
    losses.look([row for row in rows if row.request_id == again])
    losses.look(rows)
    assert [house.row(request_id).epoch for request_id in (begun, cancelled, again)] == [1, 1, 2]
    assert house.row(cancelled).state == "cancelled"
    assert house.redis.hlen("metaqore:gpu:messages") == 1


@SQLITE
def test_a_request_that_is_lost_again_and_again_is_dead(house: House, clock: Clock) -> None:
    """After as many publications as are allowed, with one terminal event."""
    losses = make_losses(house, house.publisher, clock, max_publications=3)
    request_id = house.submit()
    for _ in range(3):
        house.redis.flushall()
        losses.look(house.rows())
    row = house.row(request_id)
    assert (row.state, row.error_code, row.epoch, row.message) == ("dead", "queue_lost", 3, None)
    assert house.kinds(request_id) == ["received", "admitted", "requeued", "requeued", "dead"]
    assert house.rows() == []


class Failing(Publisher):
    """Loses Redis just before the n-th message is put."""

    def __init__(self, house: House, puts: int) -> None:
        super().__init__(house.redis, house.publisher._keys)
        self.puts = puts

    def publish(self, queued: Queued) -> None:
        """Publish, or fail."""
        self.puts -= 1
        if self.puts == 0:
            raise QueueUnavailable
        super().publish(queued)


@SQLITE
def test_redis_lost_between_commit_and_put(house: House, clock: Clock) -> None:
    """What was committed under a new epoch is put later, under that epoch, by the same housekeeper."""
    ids = [house.submit() for _ in range(4)]
    losses = make_losses(house, Failing(house, 3), clock)
    house.redis.flushall()
    with pytest.raises(QueueUnavailable):
        losses.look(house.rows())
    assert [house.queued(request_id, 2) for request_id in ids] == [True, True, False, False]
    assert losses.look(house.rows()) == 0
    assert [house.queued(request_id, 2) for request_id in ids] == [True] * 4
    assert [house.row(request_id).epoch for request_id in ids] == [2] * 4


@SQLITE
def test_a_housekeeper_that_dies_between_commit_and_put(house: House, clock: Clock) -> None:
    """The next one finds the request lost once more."""
    request_id = house.submit()
    house.redis.flushall()
    with pytest.raises(QueueUnavailable):
        make_losses(house, Failing(house, 1), clock).look(house.rows())
    assert make_losses(house, house.publisher, clock).look(house.rows()) == 1
    assert house.queued(request_id, 3)


def test_two_at_once(house: House, clock: Clock) -> None:
    """Two leaders look at the same lost requests at once: each is published again once, and each message is known."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    ids = [house.submit() for _ in range(30)]
    house.redis.flushall()
    rows, failures = house.rows(), list[Any]()
    chance = random.Random(seed)
    databases = [Database(settings().database) for _ in range(2)]

    def look(database: Database, order: list[Any]) -> None:
        own = House(house.client, database, house.redis, house.publisher)
        try:
            make_losses(own, house.publisher, clock).look(order)
        except Exception as error:  # shown below
            failures.append(error)

    orders = [chance.sample(rows, len(rows)) for _ in databases]
    threads = [threading.Thread(target=look, args=pair) for pair in zip(databases, orders, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for database in databases:
        database.close()
    assert not failures, failures
    assert {house.row(request_id).epoch for request_id in ids} == {2}
    assert all(house.queued(request_id, 2) for request_id in ids)
    assert house.redis.hlen("metaqore:gpu:messages") == len(ids)
