"""A version that becomes active is computed first: on how many workers, for how long, and what the answer says of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
import sqlalchemy as sa
from flask.testing import FlaskClient

from gateway_app.profiles import warming
from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.warming import Warming, Warmth
from gateway_app.profiles.wishes import Wishes
from tasks.prompts.layout import PromptLayout
from tasks.prompts.profile import Profile, Segment
from tasks.queueing.connecting import connect
from tasks.queueing.keys import QueueKeys
from tasks.schema import profiles as static_parts
from tasks.settings import ProfilesGroup
from tests.profile_calls import SHIPPED, activate, add, base, change, create, read
from tests.services import RedisServer, wait_until
from tests.warm_fleet import Fleet

A = "a" * 64


@pytest.fixture(params=["sqlite"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Return one kind of database: nothing is stored here that is not tried on both elsewhere."""
    kind: str = request.param
    return kind


@contextmanager
def computing(fleet: Fleet, *workers: str) -> Iterator[list[tuple[str, str]]]:
    """Have workers compute what is wished for, until the end; yields who was told to compute what."""
    done: list[tuple[str, str]] = []
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.02):
            for worker in workers:
                if profile := fleet.ask(worker):
                    done.append((worker, profile))
                    # A gateway that has somebody compute a profile has stored it.
                    query = sa.select(static_parts.c.static_token_count)
                    (row,) = read(query.where(static_parts.c.static_profile_hash == profile))
                    fleet.report(worker, **{profile: row.static_token_count})

    for worker in workers:
        fleet.report(worker)
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


CHANGES: dict[str, Callable[[FlaskClient], Any]] = {
    "a new agent": lambda client: create(client, "poet", "New.", activate=True),
    "a new version": lambda client: add(client, "own", "New.", activate=True),
    "an activation": lambda client: activate(client, "own", 2),
    "the file": lambda client: activate(client, SHIPPED, 1),
    "a rollback": lambda client: change(client, "back", "rollback"),
    "a canary": lambda client: client.put("/v1/profiles/own/canary", json={"version": 2, "share": 0.5}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_computed_before_requests_get_it(client: FlaskClient, fleet: Fleet, what: str) -> None:
    """Whatever makes a version one that requests get, a worker has it first."""
    create(client, "own", activate=True)
    add(client, "own", "Two.")
    create(client, "back", "Back one.", activate=True)
    add(client, "back", "Back two.", activate=True)
    with computing(fleet, "w1") as done:
        answer = CHANGES[what](client)
    assert answer.status_code in (200, 201), answer.text
    warm = answer.json["warm"]
    assert (warm["copies"], warm["workers"], warm["why"]) == (1, ["w1"], None)
    assert 0 <= warm["waited_s"] < 30
    assert len(done) == 1
    assert done[0][1] == answer.json.get("static_profile_hash", done[0][1])


def test_a_promoted_canary_is_warm_already(client: FlaskClient, fleet: Fleet) -> None:
    """Nothing is computed twice; nor where a version is active already."""
    create(client, "own", activate=True)
    add(client, "own", "Two.")
    with computing(fleet, "w1", "w2") as done:
        client.put("/v1/profiles/own/canary", json={"version": 2, "share": 0.5})
        promoted = client.post("/v1/profiles/own/canary/promote").json
        again = activate(client, "own", 2).json
    assert promoted["warm"]["workers"] == again["warm"]["workers"] == [done[0][0]]
    assert len(done) == 1


def test_no_worker_is_not_waited_for(client: FlaskClient, fleet: Fleet) -> None:
    """Nor one that has died; the version is active, and the answer says so."""
    fleet.report("w1")
    fleet.die("w1")
    made = create(client, "poet", activate=True).json
    assert made["active_version"] == 1
    assert (made["warm"]["workers"], made["warm"]["why"]) == ([], "no_worker")
    assert made["warm"]["waited_s"] < 5


def test_the_time_that_it_may_take(client: FlaskClient, fleet: Fleet) -> None:
    """Then it goes on, cold; the wish ends with it. Zero is not to wait at all."""
    fleet.report("w1")
    create(client, "poet", activate=False)
    began = time.monotonic()
    late = client.post("/v1/profiles/poet/activate", json={"version": 1, "warm_s": 0.3}).json
    assert time.monotonic() - began >= 0.3
    assert (late["active_version"], late["warm"]["workers"], late["warm"]["why"]) == (1, [], "not_in_time")
    wait_until(lambda: fleet.ask("w1") is None, 5, "the end of the wish")
    off = client.post("/v1/profiles/poet/activate", json={"version": 1, "warm_s": 0}).json
    assert (off["warm"]["why"], off["warm"]["waited_s"]) == ("off", 0)
    for wrong in (-1, 601, "1"):
        assert client.post("/v1/profiles/poet/activate", json={"version": 1, "warm_s": wrong}).status_code == 422


def test_what_cannot_be_warmed(client: FlaskClient, fleet: Fleet) -> None:
    """Requests never name an abstract agent."""
    fleet.report("w1")
    assert base(client, "house", "House.").json["warm"]["why"] == "abstract"
    draft: dict[str, Any] = create(client, "poet").get_json()
    assert "warm" not in draft


def test_refused_at_once(client: FlaskClient, fleet: Fleet) -> None:
    """Whoever's If-Match is out of date does not wait until a version is warm."""
    create(client, "poet", activate=True, warm_s=0)
    fleet.report("w1")
    old = {"If-Match": '"9.9.9"'}
    began = time.monotonic()
    for answer in (
        change(client, "poet", "activate", old, version=1),
        add(client, "poet", "Two.", old, activate=True),
        add(client, "poet", "Two.", activate=True, base_version=7),
    ):
        assert answer.json["code"] == "version_conflict"
    assert time.monotonic() - began < 20


def some_profile(tokens: int = 100) -> ActiveProfile:
    """Return a profile with a static part."""
    layout = cast("PromptLayout", SimpleNamespace(static_token_ids=tuple(range(tokens))))
    return ActiveProfile(Profile(agent="a", version=1, segments=(Segment(kind="role", text="One."),)), layout, A)


def warm(wishes: Wishes | None, tokens: int = 100, pinned: int = 0, **options: Any) -> Warmth:
    """Have a profile warmed where settings are as given."""
    made = Warming(wishes, lambda _organization, _active: None, ProfilesGroup(**options))
    return made.warm("acme", some_profile(tokens), pinned)


@pytest.fixture
def bare(redis_url: str) -> Iterator[Fleet]:
    """Return the fleet of a Redis without a gateway."""
    with redis.Redis.from_url(redis_url) as connection:
        yield Fleet(connection)


@pytest.mark.parametrize(
    ("copies", "pinned", "holders"), [(1, 0, 1), (2, 0, 2), (1, 2, 2), (64, 0, 3)], ids=["one", "two", "pinned", "many"]
)
def test_on_several_workers(bare: Fleet, copies: int, pinned: int, holders: int) -> None:
    """As many as the settings say, or are pinned, or as there are."""
    heard: list[Warmth] = []
    for worker in ("w1", "w2", "w3"):
        bare.report(worker)

    def progress(warmth: Warmth) -> None:
        heard.append(warmth)
        for worker in ("w1", "w2", "w3"):
            if bare.ask(worker) == A:
                bare.report(worker, a=100)
                break

    options = ProfilesGroup(warm_copies=copies)
    done = Warming(Wishes(bare.client, bare.keys), lambda *_: None, options, progress).warm(
        "acme", some_profile(), pinned
    )
    assert (len(done.workers), done.why, done.copies) == (holders, None, max(copies, pinned))
    assert [len(warmth.workers) for warmth in heard] == [*range(holders + 1)]


def test_off(bare: Fleet) -> None:
    """Zero copies, no time, no cache, or nothing to keep in it."""
    bare.report("w1")
    wishes = Wishes(bare.client, bare.keys)
    assert warm(wishes, warm_copies=0, pinned=2).why == "off"
    assert warm(wishes, warm_s=0).why == "off"
    assert warm(None).why == "off"
    assert warm(wishes, tokens=0).why == "nothing_to_cache"
    assert bare.client.exists(bare.keys.named("wanted")) == 0


def test_many_that_wait(bare: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a thread, so one more than a process has places for goes on at once."""
    bare.report("w1")
    monkeypatch.setattr(warming, "MAX_WAITING", 1)
    waits = threading.Event()
    made = Warming(Wishes(bare.client, bare.keys), lambda *_: None, ProfilesGroup(), lambda _: waits.set())
    with ThreadPoolExecutor() as pool:
        first = pool.submit(made.warm, "acme", some_profile())
        assert waits.wait(30)
        assert made.warm("acme", some_profile()).why == "many_waiting"
        bare.report("w1", a=100)
        assert first.result(30).workers == ("w1",)


def test_without_redis(own_redis: RedisServer) -> None:
    """Nobody waits for it, and why is said."""
    client = connect(own_redis.url, 1.0)
    own_redis.kill()
    assert warm(Wishes(client, QueueKeys("metaqore:"))).why == "queue_unavailable"
    client.close()
