"""Who gets what: the scripts' choice for workers that say what their caches hold."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest

from tasks.queueing.pull import Held, Report, Strategy, Wish, chain_text
from tasks.queueing.scripts import Scripts
from tests.tasks.queueing.broker import A, B, Broker, C, D

STATIC, TOKENS = 6000, 6200
RATE = 25_000.0
COPY_S = STATIC / RATE
BUDGET = 8192
BASE = "0" * 32
ALL: Held = (STATIC, STATIC, STATIC)


class Fleet:
    """Workers, played by the test."""

    def __init__(self, broker: Broker, strategy: Strategy = "cache_aware_continuous") -> None:
        self.broker = broker
        self.scripts = Scripts(broker.client, broker.keys, strategy)
        self.numbers: dict[str, int] = {}
        self.next_s: float | None = None
        self.decision: dict[str, Any] = {}
        self.left = 0
        self._count = 0

    def report(
        self, worker: str, cache: dict[str, Held] | None = None, *, full: bool | None = None, **facts: Any
    ) -> int:
        """Let a worker say what it holds; the first time, all of it."""
        first = worker not in self.numbers
        number = self.numbers[worker] = self.numbers.get(worker, 0) + 1
        full = first if full is None else full
        report = Report(worker, "epoch", number, full, cache or {}, facts)
        return int(self.scripts.run("report", report.to_json()))

    def put(
        self,
        profile: str,
        organization: str = "acme",
        count: int = 1,
        tokens: int = TOKENS,
        chain: str = "",
        ago_s: float = 0,
    ) -> list[str]:
        """Queue requests that came so many seconds ago."""
        tags = [f"m{self._count + number}:1" for number in range(count)]
        self._count += count
        for tag in tags:
            self.scripts.run("put", profile, tag, organization, tokens, 0, "text", min(STATIC, tokens), chain)
        if ago_s:
            self.broker.grow_older(profile, ago_s)
        return tags

    def reserve(self, worker: str, room: int = 8, budget: int = BUDGET, **wishes: Any) -> list[str]:
        """Return the tags of what a worker gets."""
        wish = Wish(worker, room, budget, prefill_rate=RATE, **wishes)
        messages, next_s, decision, self.left = self.scripts.run("reserve", worker, wish.to_json())
        self.next_s = float(next_s) if next_s else None
        self.decision = json.loads(decision) if decision else {}
        return [tag.decode() for tag, *_ in messages]

    def woken(self) -> set[str]:
        """Return which workers are woken; the markers are taken."""
        keys = cast("list[bytes]", self.broker.client.keys(f"{self.broker.keys.wake}*"))
        self.broker.client.delete(*keys) if keys else None
        return {key.decode().removeprefix(self.broker.keys.wake).removeprefix(":") for key in keys}

    def fall_silent(self, worker: str, for_s: float = 10) -> None:
        """Let a worker have said nothing for so long."""
        self.broker.client.zincrby(self.broker.keys.named("alive"), -for_s, worker)


@pytest.fixture
def fleet(broker: Broker) -> Fleet:
    """Return a fleet of which nothing is known yet."""
    return Fleet(broker)


def test_a_worker_takes_what_it_holds(fleet: Fleet) -> None:
    """Though something else has waited for a little longer."""
    fleet.report("one", {B: ALL})
    fleet.put(A)
    [held] = fleet.put(B)
    assert fleet.reserve("one") == [held]
    assert [candidate["profile"] for candidate in fleet.decision["candidates"]] == [B, A]
    assert fleet.decision["candidates"][0]["cached"] == STATIC


def test_waiting_wins_in_the_end(fleet: Fleet) -> None:
    """A second of computing is worth so many seconds of waiting, and no more."""
    fleet.report("one", {B: ALL})
    [old] = fleet.put(A, ago_s=32 * COPY_S + 1)
    fleet.put(B)
    assert fleet.reserve("one") == [old]


def test_a_batch_is_of_one_profile(fleet: Fleet) -> None:
    """As many as there is room for."""
    fleet.report("one", {A: ALL, B: ALL})
    tags = fleet.put(A, count=5)
    fleet.put(B, count=2)
    assert fleet.reserve("one", room=3) == tags[:3]
    assert fleet.left == 2
    assert fleet.reserve("one", room=8) == tags[3:]


def test_a_batch_fits_the_budget(fleet: Fleet) -> None:
    """Tokens that are cached are not computed, and so not counted."""
    fleet.report("one", {A: ALL})
    tags = fleet.put(A, count=5)
    assert fleet.reserve("one", budget=650, in_flight=1) == tags[:3]
    assert fleet.reserve("one", budget=199, in_flight=1) == []
    assert fleet.reserve("one", budget=199) == tags[3:4]


def test_a_large_one_is_not_overtaken_for_ever(fleet: Fleet) -> None:
    """While the cheapest does not fit, nothing else is begun, and soon it fits."""
    fleet.report("one", {B: ALL})
    [large] = fleet.put(A, tokens=50_000, ago_s=60)
    fleet.put(B)
    assert fleet.reserve("one", budget=8000, in_flight=192) == []
    assert fleet.reserve("one") == [large]


def test_what_is_cached_passes_what_does_not_fit_beside_a_long_prompt(fleet: Fleet) -> None:
    """It holds nobody up. Once the long one is through, it does not pass any more."""
    fleet.report("one", {B: ALL, C: ALL})
    [large] = fleet.put(A, ago_s=60)
    [first] = fleet.put(B)
    [second] = fleet.put(C, "other")
    assert {*fleet.reserve("one", budget=2000, in_flight=6192), *fleet.reserve("one", budget=1800, in_flight=6392)} == {
        first,
        second,
    }
    [third] = fleet.put(B)
    assert fleet.reserve("one", budget=6193, in_flight=1999) == []
    assert fleet.reserve("one", budget=8192) == [large]
    assert fleet.reserve("one") == [third]


def test_a_worker_that_lets_others_pass_stays_awake_for_them(fleet: Fleet) -> None:
    """A request that is cached there wakes it, though it cannot have the one before."""
    fleet.report("one", {B: ALL})
    fleet.put(A)
    assert fleet.reserve("one", budget=2000, in_flight=6192) == []
    fleet.woken()
    [tag] = fleet.put(B)
    assert fleet.woken() == {"one"}
    assert fleet.reserve("one", budget=2000, in_flight=6192) == [tag]


def test_siblings_wait_for_the_first(fleet: Fleet) -> None:
    """The first of a cold profile computes its prefix; the others come when it is there."""
    fleet.report("one")
    tags = fleet.put(A, count=3)
    assert fleet.reserve("one") == tags[:1]
    assert fleet.reserve("one") == []
    assert fleet.next_s is not None
    assert 0 < fleet.next_s < 2
    fleet.woken()
    fleet.report("one", {A: (4096, 4096, 4096)})
    assert fleet.woken() == set()
    assert fleet.reserve("one") == []
    fleet.report("one", {A: ALL})
    assert fleet.woken() == {"one"}
    assert fleet.reserve("one") == tags[1:]


def test_siblings_do_not_wait_for_a_worker_that_reports_nothing(fleet: Fleet) -> None:
    """It would never say that the prefix is there."""
    tags = fleet.put(A, count=2)
    assert fleet.reserve("silent") == tags[:1]
    assert fleet.reserve("silent") == tags[1:]


def test_a_copy_is_made_once_waiting_costs_more(fleet: Fleet) -> None:
    """What all of them together have waited counts."""
    fleet.report("one", {A: ALL})
    fleet.report("two", {})
    tags = fleet.put(A, count=4)
    assert fleet.reserve("two", free_tokens=100_000) == []
    assert fleet.next_s == pytest.approx(4 * COPY_S / 4, abs=0.05)
    fleet.broker.grow_older(A, COPY_S)
    assert fleet.reserve("two", free_tokens=100_000) == tags[:1]
    assert fleet.decision["candidates"][0]["copies"] == 1


def test_a_worker_with_much_less_in_hand_has_a_copy_at_once(fleet: Fleet) -> None:
    """If it has memory to spare: holders that take everything at once leave nothing waiting that could earn one."""
    for worker in ("one", "two"):
        fleet.report(worker, {A: ALL} if worker == "one" else {})
    fleet.reserve("one", load=90_000)
    [tag] = fleet.put(A)
    assert fleet.reserve("two", load=70_000, free_tokens=100_000) == []
    assert fleet.reserve("two", load=10_000, free_tokens=50_000) == []
    assert fleet.reserve("two", load=10_000, free_tokens=100_000) == [tag]
    assert fleet.decision["candidates"][0]["lightest"] == 90_000


def test_a_crowd_has_a_copy_with_less_memory_to_spare(fleet: Fleet) -> None:
    """Where the holder runs so many requests of the profile that a copy relieves it; and what it ran long ago does not count."""
    for worker in ("one", "two"):
        fleet.report(worker, {A: ALL} if worker == "one" else {})
    idle: dict[str, Any] = {"load": 10_000, "free_tokens": 4 * STATIC, "seats": 64}

    def serve(runs: int) -> None:
        fleet.put(A)
        assert fleet.reserve("one", load=90_000, seats=64, hot={A: runs - 1})

    serve(15)
    fleet.put(A)
    assert fleet.reserve("two", **idle) == []
    serve(15)
    [tag] = fleet.put(A)
    assert fleet.reserve("two", **{**idle, "free_tokens": 2 * STATIC}) == []
    assert fleet.reserve("two", **{**idle, "load": 90_000}) == []
    assert fleet.reserve("two", **idle) == [tag]
    assert fleet.decision["candidates"][0]["fewest"] == 16


def test_a_few_are_no_crowd(fleet: Fleet) -> None:
    """However few a holder can run: for one or two, waiting costs less than a copy."""
    for worker in ("one", "two"):
        fleet.report(worker, {A: ALL} if worker == "one" else {})
    fleet.put(A, count=3)
    fleet.reserve("one", room=2, load=90_000, seats=2)
    assert fleet.reserve("two", load=10_000, free_tokens=4 * STATIC, seats=2) == []


def test_what_a_holder_ran_is_forgotten(fleet: Fleet) -> None:
    """After a second, a crowd may have gone."""
    for worker in ("one", "two"):
        fleet.report(worker, {A: ALL} if worker == "one" else {})
    fleet.put(A, count=2)
    fleet.reserve("one", room=1, load=90_000, seats=64, hot={A: 40})
    noted = fleet.broker.keys.named(f"runs:{A}")
    runs, at = cast("bytes", fleet.broker.client.hget(noted, "one")).decode().split()
    fleet.broker.client.hset(noted, "one", f"{runs} {float(at) - 2:.6f}")
    assert fleet.reserve("two", load=10_000, free_tokens=4 * STATIC, seats=64) == []


def test_a_report_tells_of_less_load(fleet: Fleet) -> None:
    """So that a worker whose requests have ended is woken again, without asking for any."""
    for worker, load in (("one", 500), ("two", 300)):
        fleet.report(worker, {A: ALL})
        fleet.reserve(worker, load=load)
    fleet.report("one", load=0)
    fleet.woken()
    fleet.put(A)
    assert fleet.woken() == {"one"}


def test_who_computes_is_woken_after_all_others(fleet: Fleet) -> None:
    """A holder, or anybody: what is new would wait for what is computed. It counts for as long as that takes."""
    for worker, load in (("one", 500), ("two", 300)):
        fleet.report(worker, {A: ALL})
        fleet.reserve(worker, load=load)
    fleet.put(B, tokens=STATIC + 4 * int(RATE))
    assert fleet.reserve("two", load=0, budget=10**6) != []
    fleet.report("two", load=300)
    fleet.woken()
    for profile in (A, C):
        fleet.put(profile)
        assert fleet.woken() == {"one"}
    computes = fleet.broker.keys.named("computes")
    until = float(cast("bytes", fleet.broker.client.hget(computes, "two")))
    fleet.broker.client.hset(computes, "two", until - 60)
    fleet.put(A)
    assert fleet.woken() == {"two"}


def test_the_holder_is_woken_where_all_others_are_being_woken(fleet: Fleet) -> None:
    """However many have less in hand than it."""
    for number in range(12):
        fleet.report(f"w{number}", {A: ALL} if number == 11 else {})
        fleet.reserve(f"w{number}", load=number)
    fleet.woken()
    for number in range(10):
        fleet.put(f"{number:064x}")
    fleet.put(A)
    assert "w11" in fleet.woken()


def test_who_has_much_less_in_hand_is_woken_too(fleet: Fleet) -> None:
    """Beside the one that holds the profile."""
    for worker, load in (("one", 500), ("two", 100)):
        fleet.report(worker, {A: ALL} if worker == "one" else {})
        fleet.reserve(worker, load=load)
    fleet.woken()
    fleet.put(A)
    assert fleet.woken() == {"one", "two"}


def test_a_copy_that_evicts_costs_more(fleet: Fleet) -> None:
    """Where a known prefix must go for it, waiting has to be longer."""
    fleet.report("one", {A: ALL})
    fleet.report("two", {})
    fleet.put(A, ago_s=4 * COPY_S + 0.1)
    assert fleet.reserve("two", free_tokens=STATIC - 1) == []
    assert fleet.next_s is not None
    assert fleet.reserve("two", free_tokens=STATIC) != []


def test_what_a_dead_worker_held_is_free(fleet: Fleet) -> None:
    """As soon as it has not been heard of for some seconds."""
    fleet.report("one", {A: ALL})
    fleet.report("two", {})
    [tag] = fleet.put(A)
    assert fleet.reserve("two") == []
    fleet.fall_silent("one")
    assert fleet.reserve("two") == [tag]


def test_a_worker_that_ends_leaves_nothing(fleet: Fleet) -> None:
    """Neither what it held, nor what it was just computing."""
    fleet.report("one", {A: ALL, BASE: (100, 100, 100)})
    fleet.put(B)
    fleet.reserve("one")
    fleet.scripts.run("unreport", "one")
    fleet.report("two", {})
    fleet.broker.client.zadd(fleet.broker.keys.named("fills"), {f"{B} one": 1})
    fleet.broker.client.hset(fleet.broker.keys.named(f"copies:{B}"), "one", "filling 1.0 6000")
    fleet.report("two", {})
    left = {key.decode() for key in cast("list[bytes]", fleet.broker.client.keys("*"))}
    assert not [key for key in left if "copies" in key or key.endswith((":one", "fills"))]


def test_a_long_dead_worker_is_forgotten(fleet: Fleet) -> None:
    """By the reports of the others."""
    fleet.report("one", {A: ALL})
    fleet.fall_silent("one", 100)
    fleet.report("two", {})
    assert fleet.broker.client.keys(f"{fleet.broker.keys.named('copies')}*") == []
    assert fleet.broker.hash("facts").keys() == {"two"}


def test_reports_without_a_gap(fleet: Fleet) -> None:
    """After a gap, another epoch, or a loss of everything, a worker says all it holds."""
    assert fleet.report("one", {A: ALL}, full=False) == 0
    assert fleet.report("one", {A: ALL}, full=True) == 1
    assert fleet.report("one", {B: (64, 64, 64)}) == 1
    fleet.numbers["one"] += 1
    assert fleet.report("one", {C: ALL}) == 0
    assert fleet.broker.hash("cache:one") == {A: "6000 6000 6000", B: "64 64 64"}
    assert fleet.report("one", {C: ALL}, full=True) == 1
    assert fleet.broker.hash("cache:one") == {C: "6000 6000 6000"}
    assert fleet.report("one", {C: (0, 0, 0)}) == 1
    assert fleet.broker.hash("cache:one") == {}
    fleet.broker.client.flushall()
    assert fleet.report("one", {}) == 0


def test_a_shared_base_is_part_of_the_price(fleet: Fleet) -> None:
    """A worker that has computed another profile with the same base needs to compute the rest only."""
    chain = chain_text(((BASE, 4000),))
    fleet.report("one", {BASE: (4000, 4000, 4000)})
    fleet.put(B)
    [tag] = fleet.put(A, chain=chain)
    assert fleet.reserve("one") == [tag]
    assert fleet.decision["candidates"][0]["seconds"] == pytest.approx(2000 / RATE)


def test_a_tier_is_part_of_the_price(fleet: Fleet) -> None:
    """Loading costs less than computing, and more than nothing."""
    fleet.report("one", {A: (0, 0, STATIC), B: (0, STATIC, STATIC), C: (1000, STATIC, STATIC)})
    for profile in (A, B, C, D):
        fleet.put(profile)
    fleet.reserve("one", room=1, ram_rate=250_000, disk_rate=50_000)
    seconds = {one["profile"]: one["seconds"] for one in fleet.decision["candidates"]}
    assert seconds == pytest.approx({C: 0.02, B: 0.024, A: 0.12, D: 0.24})
    assert fleet.decision["candidates"][0]["profile"] == C


def test_an_organization_that_was_served_less_comes_first(fleet: Fleet) -> None:
    """Whatever another has queued before."""
    fleet.report("one", {A: ALL, B: ALL})
    fleet.put(A, "flood", count=10)
    assert len(fleet.reserve("one", room=2)) == 2
    [tag] = fleet.put(B, "calm")
    assert fleet.reserve("one", room=1) == [tag]


def test_shares_are_equal_in_tokens(fleet: Fleet) -> None:
    """One asks much at a time, another little: both get as many tokens."""
    fleet.report("one", {A: ALL, B: ALL})
    fleet.put(A, "large", count=60, tokens=6000)
    fleet.put(B, "small", count=300, tokens=1000)
    counts = {"large": 0, "small": 0}
    for _ in range(70):
        fleet.reserve("one", room=1)
        counts["large" if fleet.decision["candidates"][0]["profile"] == A else "small"] += 1
    assert counts["small"] == pytest.approx(6 * counts["large"], abs=6)


def test_who_was_away_has_nothing_saved_up(fleet: Fleet) -> None:
    """Nor does it pay for what it got while others were away."""
    fleet.report("one", {A: ALL, B: ALL})
    fleet.put(A, "busy", count=40)
    for _ in range(20):
        fleet.reserve("one", room=1)
    fleet.put(B, "late", count=20)
    served = []
    for _ in range(10):
        fleet.reserve("one", room=1)
        served.append(fleet.decision["candidates"][0]["profile"])
    assert served.count(A) in (4, 5, 6)


def test_work_is_conserved(fleet: Fleet) -> None:
    """Where the first organization has nothing that this worker may take, the next one has its turn."""
    fleet.report("one", {A: ALL})
    fleet.report("two", {B: ALL})
    fleet.put(A, "first")
    [tag] = fleet.put(B, "second")
    assert fleet.reserve("two") == [tag]


def test_the_last_places_are_kept_from_a_flood(fleet: Fleet) -> None:
    """While others ask. They are for those; and where nobody else asks, nothing is kept."""
    fleet.report("one", {A: ALL, B: ALL})
    flood = fleet.put(A, "flood", count=30)
    others: dict[str, Any] = {"seats": 32, "organizations": ("calm",), "in_flight": 1}
    assert fleet.reserve("one", room=5, **others) == flood[:3]
    assert fleet.reserve("one", room=2, **others) == []
    assert fleet.next_s is None
    [calm] = fleet.put(B, "calm")
    assert fleet.reserve("one", room=2, **others) == [calm]
    assert fleet.reserve("one", room=2, seats=32, organizations=("flood",)) == flood[3:5]


def test_the_last_tokens_are_kept_from_a_flood(fleet: Fleet) -> None:
    """What is to be computed of it leaves an eighth to others."""
    fleet.report("one", {A: ALL, B: ALL})
    flood = fleet.put(A, "flood", count=30)
    others: dict[str, Any] = {"room": 32, "seats": 32, "organizations": ("calm",)}
    assert fleet.reserve("one", budget=1400, in_flight=200, **others) == flood[:6]
    assert fleet.reserve("one", budget=200, in_flight=1400, **others) == []
    [calm] = fleet.put(B, "calm")
    assert fleet.reserve("one", budget=200, in_flight=1400, **others) == [calm]


def test_who_asks_for_little_is_no_flood(fleet: Fleet) -> None:
    """A few, or no more than its share of what waits: these may have the last places."""
    fleet.report("one", {A: ALL, B: ALL})
    few = fleet.put(A, "few", count=8)
    assert fleet.reserve("one", room=2, seats=32, organizations=("calm",)) == few[:2]
    fleet.put(A, "few", count=12)
    fleet.put(B, "other", count=18)
    assert len(fleet.reserve("one", room=2, seats=32)) == 2


def test_a_decision_shows_nothing_of_other_organizations(fleet: Fleet) -> None:
    """It goes into the record of one of them."""
    fleet.report("one", {B: ALL})
    fleet.put(A, "first")
    fleet.put(B, "second", count=3)
    fleet.reserve("one")
    assert len({one["profile"] for one in fleet.decision["candidates"]}) == 1


def test_the_least_loaded_holder_is_woken(fleet: Fleet) -> None:
    """Or else the least loaded of all; and while that one is being woken, another."""
    for worker, load in (("one", 500), ("two", 300), ("three", 200)):
        fleet.report(worker, {A: ALL} if worker != "three" else {})
        fleet.reserve(worker, load=load)
    fleet.woken()
    fleet.put(A)
    assert fleet.woken() == {"two"}
    fleet.put(B)
    assert fleet.woken() == {"three"}
    fleet.put(A, count=3)
    assert fleet.woken() >= {"one", "two", "three"}


def test_a_worker_that_is_full_wakes_another(fleet: Fleet) -> None:
    """What it must leave behind is somebody else's to look at."""
    for worker in ("one", "two"):
        fleet.report(worker, {A: ALL})
        fleet.reserve(worker)
    fleet.put(A, count=2)
    fleet.woken()
    assert len(fleet.reserve("one", room=1)) == 1
    assert fleet.woken() == {"two"}


def test_nobody_without_room_is_woken(fleet: Fleet) -> None:
    """It looks by itself once it has room."""
    fleet.report("one", {A: ALL})
    fleet.reserve("one", room=0)
    fleet.put(A)
    assert fleet.woken() == {""}


def test_fifo(broker: Broker) -> None:
    """The oldest first, whoever holds what, one at a time."""
    fleet = Fleet(broker, "fifo")
    fleet.report("one", {B: ALL})
    [old] = fleet.put(A)
    fleet.put(B, count=2)
    assert fleet.reserve("one") == [old]


def test_least_loaded(broker: Broker) -> None:
    """Only the one with the fewest tokens in hand gets anything."""
    fleet = Fleet(broker, "least_loaded")
    fleet.reserve("one", load=10)
    fleet.reserve("two", load=20)
    tags = fleet.put(A, count=2)
    assert fleet.reserve("two", load=20) == []
    assert fleet.reserve("one", load=10) == tags[:1]
    assert fleet.reserve("one", load=30) == []
    assert fleet.reserve("two", load=20) == tags[1:]


def test_round_robin(broker: Broker) -> None:
    """Each in turn, of those that live and have room."""
    fleet = Fleet(broker, "round_robin")
    for worker in ("one", "three", "two"):
        fleet.reserve(worker)
    fleet.put(A, count=7)

    def served(*workers: str) -> str:
        return next(worker for worker in workers if fleet.reserve(worker))

    assert [served("two", "three", "one") for _ in range(5)] == ["one", "three", "two", "one", "three"]
    fleet.reserve("two", room=0)
    assert served("three", "one") == "one"


def test_round_robin_wakes_whose_turn_it_is(broker: Broker) -> None:
    """Who was woken and must leave a request to another tells that one, and nobody where none waits."""
    fleet = Fleet(broker, "round_robin")
    for worker in ("one", "two"):
        fleet.reserve(worker)
    fleet.put(A, count=2)
    fleet.reserve("one")
    fleet.woken()
    assert fleet.reserve("one") == []
    assert fleet.woken() == {"two"}
    assert len(fleet.reserve("two")) == 1
    fleet.reserve("two")
    assert fleet.woken() == set()


@pytest.mark.parametrize(("strategy", "profile"), [("fifo", A), ("cache_aware_continuous", B)])
def test_a_decision_is_replayed(fleet: Fleet, strategy: Strategy, profile: str) -> None:
    """Under its own strategy it comes out as it did; under another, as that one decides."""
    fleet.report("one", {B: ALL})
    fleet.put(A)
    fleet.put(B)
    fleet.reserve("one")
    again = Scripts(fleet.broker.client, fleet.broker.keys, strategy).run("replay", json.dumps(fleet.decision))
    replayed = json.loads(again)
    assert fleet.decision["candidates"][replayed["chosen"]]["profile"] == profile
    if strategy == "cache_aware_continuous":
        assert replayed["prices"] == pytest.approx([one["price"] for one in fleet.decision["candidates"]])


def test_a_release_that_knows_of_no_organizations(fleet: Fleet) -> None:
    """What its gateway put is found, and what its worker took leaves nothing behind."""
    client, keys = fleet.broker.client, fleet.broker.keys
    seconds, _ = client.time()
    turn = f"{seconds}.000000"
    client.lpush(keys.lists + A, f"{turn} old:1")
    client.hset(keys.named("messages"), "old:1", json.dumps([turn, A, "acme", TOKENS]) + "\ntext")
    client.zadd(keys.named("ready"), {A: turn})
    client.hset(
        keys.named("counts"),
        mapping={"requests": 1, "requests acme": 1, "tokens": TOKENS, "tokens acme": TOKENS, "priority normal": 1},
    )
    assert fleet.reserve("one") == ["old:1"]
    fleet.broker.check()
    [tag] = fleet.put(B)
    client.rpop(keys.lists + B)
    client.zrem(keys.named("ready"), B)
    assert fleet.reserve("one") == []
    assert client.exists(keys.named("ready:acme")) == 0
    assert fleet.broker.hash("lists") == {}
    fleet.scripts.run("drop", tag)


@pytest.mark.parametrize("wish", ["", "[]", "{}", '{"worker": 1}', "x" * 1000])
def test_a_wish_that_is_none(fleet: Fleet, wish: str) -> None:
    """It is refused, and takes nothing."""
    tags = fleet.put(A)
    with pytest.raises(Exception, match="script"):
        fleet.scripts.run("reserve", "one", wish)
    assert fleet.reserve("one") == tags


def test_many_lists_and_organizations(fleet: Fleet) -> None:
    """Everything is taken, each once, by workers that take turns, and nothing is left behind in Redis."""
    seen: list[str] = []
    put: list[str] = []
    for number in range(120):
        put += fleet.put(f"{number:064x}", f"org{number % 7}", count=1 + number % 3)
    for worker in ("one", "two"):
        fleet.report(worker, {f"{number:064x}": ALL for number in range(0 if worker == "one" else 1, 40, 2)})
    while len(seen) < len(put):
        for worker in ("one", "two"):
            seen += (taken := fleet.reserve(worker, room=3, patience=0))
            if taken:
                # It has computed the profile, so that nothing has to wait for that here.
                fleet.report(worker, {fleet.decision["candidates"][0]["profile"]: ALL})
            fleet.broker.check()
    assert sorted(seen) == sorted(put)
    assert fleet.broker.client.exists(*(fleet.broker.keys.named(name) for name in ("lists", "sums", "ready"))) == 0
