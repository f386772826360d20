"""Wishes for warm profiles: who is asked to compute what, and when nobody is."""

from __future__ import annotations

import json

import pytest
import redis

from tests.warm_fleet import TOKENS, Fleet

A, B, C = (letter * 64 for letter in "abc")


@pytest.fixture
def fleet(redis_url: str) -> Fleet:
    """Return an empty fleet."""
    return Fleet(redis.Redis.from_url(redis_url))


def test_one_worker_computes_it(fleet: Fleet) -> None:
    """The first that asks is told to, no other, and nobody once it is there."""
    fleet.report("w1")
    fleet.report("w2")
    assert fleet.ask("w1") is None
    assert fleet.wish(A) == [1, 2]
    assert fleet.ask("w1") == A
    assert fleet.ask("w1") is None
    assert fleet.ask("w2") is None
    assert fleet.wish(A) == [1, 2, "filling w1"]
    fleet.report("w1", a=3000)
    assert fleet.wish(A) == [1, 2, "filling w1"]
    fleet.report("w1", a=TOKENS)
    assert fleet.wish(A) == [1, 2, "held w1"]
    assert fleet.ask("w2") is None
    fleet.report("w1", a=0)
    assert fleet.ask("w2") == A


def test_as_many_copies_as_are_wanted(fleet: Fleet) -> None:
    """Each on a worker of its own."""
    for worker in ("w1", "w2", "w3"):
        fleet.report(worker)
    fleet.wish(A, copies=2)
    assert [fleet.ask(worker) for worker in ("w1", "w2", "w3")] == [A, A, None]
    fleet.wish(A, copies=3)
    assert fleet.ask("w3") == A
    fleet.wish(A, copies=1)
    assert fleet.wish(A, copies=0) == [1, 3, "filling w1", "filling w2", "filling w3"]


@pytest.mark.parametrize("held", [0, TOKENS])
def test_a_dead_worker_does_not_count(fleet: Fleet, held: int) -> None:
    """Whether it was computing it or had it, another computes it, and it gets nothing itself."""
    fleet.report("w1")
    fleet.report("w2")
    fleet.wish(A)
    assert fleet.ask("w1") == A
    if held:
        fleet.report("w1", a=held)
    assert fleet.ask("w2") is None
    fleet.die("w1")
    assert fleet.ask("w1") is None
    assert fleet.ask("w2") == A
    assert fleet.wish(A) == [1, 1, "filling w2"]


def test_computing_that_takes_too_long_is_not_believed(fleet: Fleet) -> None:
    """A mark ends by itself; another worker may compute it then."""
    fleet.report("w1")
    fleet.report("w2")
    fleet.wish(A)
    assert fleet.ask("w1") == A
    seconds, _ = fleet.client.time()
    how, until, tokens = fleet.client.hget(fleet.keys.named(f"copies:{A}"), "w1").split()  # type: ignore[union-attr]
    assert (how, int(tokens)) == (b"filling", TOKENS)
    assert 5 <= float(until) - seconds < 10
    fleet.client.hset(fleet.keys.named(f"copies:{A}"), "w1", f"filling {seconds - 1} {TOKENS}")
    assert fleet.ask("w2") == A


def test_what_was_given_up_is_for_others(fleet: Fleet) -> None:
    """A worker that failed takes its mark back; one that was evicted from it lately is spared."""
    fleet.report("w1")
    fleet.report("w2")
    fleet.wish(A)
    assert fleet.ask("w1") == A
    assert fleet.ask("w1", spared=(A,), given_up=(A,)) is None
    assert fleet.wish(A) == [1, 2]
    assert fleet.ask("w1", spared=(A,)) is None
    assert fleet.ask("w2") == A
    fleet.report("w2", a=TOKENS)
    assert fleet.ask("w2", given_up=(A,)) is None
    assert fleet.wish(A) == [1, 2, "held w2"]


def test_requests_come_first(fleet: Fleet) -> None:
    """No profile is computed without room, beyond the budget, or while requests wait that there is no room for."""
    fleet.report("w1")
    fleet.wish(A)
    assert fleet.ask("w1", room=0) is None
    assert fleet.ask("w1", budget=5999, in_flight=1) is None
    assert fleet.ask("w1", keeps=5999) is None
    fleet.client.zadd(fleet.keys.named("ready"), {B: 1})
    assert fleet.ask("w1") is None
    fleet.client.zadd(fleet.keys.named("idle"), {"w1": 0})
    assert fleet.ask("w1", budget=100, in_flight=0) == A


def test_a_copy_is_one_on_the_gpu(fleet: Fleet) -> None:
    """What was evicted to RAM is computed, or loaded, again."""
    fleet.report("w1", a=(3000, TOKENS, TOKENS))
    assert fleet.wish(A) == [1, 1]
    assert fleet.ask("w1") == A


def test_whoever_waits_comes_first_and_not_for_ever(fleet: Fleet) -> None:
    """A wish that ends comes before those that last; it ends, and is forgotten."""
    fleet.report("w1")
    for index in range(100):
        fleet.wish(f"{index:064d}")
    fleet.wish(A, seconds=30)
    fleet.wish(B, seconds=30)
    over = json.loads(fleet.client.hget(fleet.keys.named("wanted"), B) or "") | {"until": 1}
    fleet.client.hset(fleet.keys.named("wanted"), B, json.dumps(over))
    fleet.client.zadd(fleet.keys.named("awaited"), {B: 1})
    assert fleet.ask("w1") == A
    assert fleet.ask("w1") not in (None, A, B)
    assert fleet.client.hexists(fleet.keys.named("wanted"), B) is False
    assert fleet.client.zrange(fleet.keys.named("awaited"), 0, -1) == [A.encode()]


def test_all_of_many_wishes_are_met(fleet: Fleet) -> None:
    """However many they are, each comes up."""
    fleet.report("w1")
    wished = {f"{index:064d}" for index in range(64)}
    for profile in wished:
        fleet.wish(profile)
    asked = [fleet.ask("w1") for _ in range(400)]
    assert {profile for profile in asked if profile} == wished


def test_a_pin_outlasts_a_wish(fleet: Fleet) -> None:
    """A wish that ends does not change one that lasts; the other way round it does."""
    fleet.report("w1")
    fleet.wish(A, copies=1)
    assert fleet.wish(A, copies=3, seconds=5) == [1, 1]
    assert json.loads(fleet.client.hget(fleet.keys.named("wanted"), A) or "")["until"] == 0
    fleet.wish(B, copies=3, seconds=5)
    assert fleet.wish(B, copies=2) == [2, 1]
    assert fleet.client.zcard(fleet.keys.named("awaited")) == 0


def test_looking_wishes_for_nothing(fleet: Fleet) -> None:
    """Zero copies only tell."""
    fleet.report("w1", a=TOKENS)
    assert fleet.wish(A, copies=0) == [0, 1, "held w1"]
    assert fleet.client.exists(fleet.keys.named("wanted")) == 0


@pytest.mark.parametrize(
    "text", ["", "no JSON", "7", "[]", '{"copies": 1}', '{"copies": "x", "until": 0, "static_tokens": 1}']
)
def test_what_somebody_else_wrote_is_forgotten(fleet: Fleet, text: str) -> None:
    """It stops nobody."""
    fleet.report("w1")
    fleet.client.hset(fleet.keys.named("wanted"), C, text)
    assert fleet.ask("w1") is None
    assert fleet.client.exists(fleet.keys.named("wanted")) == 0
    fleet.client.hset(fleet.keys.named("wanted"), A, text)
    assert fleet.wish(A) == [1, 1]
    assert fleet.ask("w1") == A
