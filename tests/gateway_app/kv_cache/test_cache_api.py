"""`/v1/cache`: what an organization sees of its profiles in the workers' caches, and of nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask.testing import FlaskClient

from gateway_app import build
from gateway_app.kv_cache import fleet
from tasks.cache_hits import HOUR_S, Hits
from tasks.queueing.keys import script
from tasks.queueing.pull import Held
from tasks.settings import settings
from tests.conftest import new_key
from tests.gateway_app.kv_cache.reported import HOUSE, Reporters, make, named, shown
from tests.profile_calls import SHIPPED, connected
from tests.services import free_port

SQLITE = pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)


@pytest.fixture
def reporters(configured: None, redis_url: str) -> Iterator[Reporters]:
    """Return workers that only report."""
    made = Reporters(redis_url)
    with made.client:
        yield made


def whole(tokens: int) -> Held:
    """Return what is held of a prefix that is on the GPU."""
    return tokens, tokens, tokens


@SQLITE
def test_a_base_and_those_who_share_it(client: FlaskClient, reporters: Reporters) -> None:
    """The segment comes once, with the profiles below it; each with its tokens, and who holds how much of it."""
    make(client, "poet", "Poet.")
    make(client, "painter", "Painter.")
    make(client, "other", None, text="Elsewhere. " * 30)
    other, segment, painter, poet = shown(client)["data"]
    assert [entry["type"] for entry in (other, segment, painter, poet)] == ["profile", "segment", "profile", "profile"]
    assert (segment["kinds"], segment["profiles"], segment["depth"]) == (["agent_base_profile"], 2, 0)
    assert [(entry["agent"], entry["parent"], entry["depth"]) for entry in (other, painter, poet)] == [
        ("other", None, 0),
        ("painter", segment["link"], 1),
        ("poet", segment["link"], 1),
    ]
    assert 0 < segment["tokens"] < min(poet["tokens"], painter["tokens"])
    assert all(entry["copies"] == [] and entry["hit_rate"] is None for entry in (other, segment, painter, poet))

    tokens, part = poet["tokens"], segment["tokens"]
    reporters.report("gpu@a", {poet["link"]: whole(tokens), segment["link"]: whole(part)})
    reporters.report("gpu@b", {segment["link"]: (16, part, part), painter["link"]: (0, 16, 32)})
    page = shown(client)
    segment = page["data"][1]
    copy = {"worker": "gpu@a", "tier": "gpu", "gpu_tokens": tokens, "ram_tokens": tokens, "disk_tokens": tokens}
    assert named(page, "poet")["copies"] == [copy]
    assert [(each["worker"], each["tier"]) for each in segment["copies"]] == [("gpu@a", "gpu"), ("gpu@b", "ram")]
    (held,) = named(page, "painter")["copies"]
    assert (held["tier"], held["gpu_tokens"], held["ram_tokens"], held["disk_tokens"]) == ("part", 0, 16, 32)


@SQLITE
def test_a_base_that_is_an_agent_itself(client: FlaskClient) -> None:
    """It ends where those who extend it go on."""
    make(client, "house", None)
    make(client, "poet", "Poet.")
    segment, house, poet = shown(client)["data"]
    assert segment["link"] == house["link"][:32]
    assert {house["parent"], poet["parent"]} == {segment["link"]}
    assert segment["profiles"] == 2


@SQLITE
def test_hits(client: FlaskClient, reporters: Reporters) -> None:
    """Of this hour and the one before, of each link; what is older is not read."""
    make(client, "poet", "Poet.")
    link = shown(client)["data"][0]["link"]
    reporters.count({link: Hits(3, 2, 300, 210, 1.0)})
    reporters.count({link: Hits(1, 1, 100, 90, 5.0)}, ago_s=HOUR_S)
    reporters.count({link: Hits(9, 9, 900, 900, 9.0)}, ago_s=2 * HOUR_S)
    entry = named(shown(client), "poet")
    assert (entry["requests"], entry["hits"], entry["hit_rate"]) == (4, 3, 0.75)
    assert entry["last_asked_s"] > 0
    assert reporters.client.ttl(reporters.client.keys("*cache-hits*")[0]) > HOUR_S


@SQLITE
def test_others_see_nothing(client: FlaskClient, reporters: Reporters) -> None:
    """The same text is another profile for another organization, and it is in nobody's cache for it."""
    others = {"Authorization": f"Bearer {new_key('other')}"}
    make(client, "poet", "Poet.")
    before = shown(client, headers=others)
    assert before["data"] == []
    make(client, "poet", "Poet.", headers={"Authorization": f"Bearer {new_key('other', 'admin')}"})
    reporters.report("gpu@a", {})
    calm = shown(client, headers=others)
    (theirs,), (ours,) = calm["data"], shown(client)["data"]
    assert theirs["link"] != ours["link"]
    cache = {ours["link"]: whole(ours["tokens"])}
    reporters.report("gpu@a", cache, running=60, load=99_999, free_tokens=0, hit_tokens=199, prefill_rate=3.0)
    reporters.count({ours["link"]: Hits(3, 2, 300, 210, 1.0)})
    assert shown(client, headers=others) == calm
    assert named(shown(client), "poet")["copies"] != []
    assert set(calm["workers"][0]) == {"worker", "model", "capacity_tokens"}


def test_pages(client: FlaskClient) -> None:
    """By agent; each shows its own part of the tree, and where the next begins."""
    for number in range(5):
        make(client, f"agent-{number}", f"Role {number}.")
    seen, query = [], "?limit=2"
    while True:
        page = shown(client, query)
        seen.append([entry["agent"] for entry in page["data"] if entry["type"] == "profile"])
        if not page["has_more"]:
            break
        query = f"?limit=2&after={page['next']}"
    assert seen == [["agent-0", "agent-1"], ["agent-2", "agent-3"], ["agent-4"]]
    assert page["next"] is None
    assert [entry["agent"] for entry in shown(client, "?agent=agent-3")["data"]] == ["agent-3"]


def test_shipped_profiles(client: FlaskClient) -> None:
    """They are there once a request of the organization got them, between the organization's own."""
    for agent in ("first", "last"):
        make(client, agent, None, text=f"{agent}. " * 20)
    assert [entry["agent"] for entry in shown(client)["data"]] == ["first", "last"]
    assert client.post("/v1/tasks", json={"agent": SHIPPED, "directive": "What now?"}).status_code == 202
    assert [entry["agent"] for entry in shown(client)["data"]] == ["first", SHIPPED, "last"]
    page = shown(client, "?limit=2")
    assert [entry["agent"] for entry in page["data"]] == ["first", SHIPPED]
    assert [entry["agent"] for entry in shown(client, f"?after={page['next']}")["data"]] == ["last"]


def test_agents_that_say_the_same(client: FlaskClient) -> None:
    """They are one profile to the workers; each is shown under its own name, and so is each version."""
    for agent in ("poet", "painter"):
        make(client, agent, "Artist.")
    again = {"segments": [{"kind": "agent_base_profile", "text": HOUSE}, {"kind": "role", "text": "Artist."}]}
    assert client.post("/v1/profiles/poet/versions", json={**again, "activate": True}).status_code == 201
    painter, poet, newer = shown(client)["data"]
    assert [(entry["agent"], entry["version"]) for entry in (painter, poet, newer)] == [
        ("painter", 1),
        ("poet", 1),
        ("poet", 2),
    ]
    assert len({entry["link"] for entry in (painter, poet, newer)}) == 1


@SQLITE
def test_bad_queries(client: FlaskClient) -> None:
    """Each is refused; a place that nothing is at is one like any other."""
    for query in ("limit=0", "limit=101", "after=x", "after=:poet", "nothing=1", "limit=1&limit=2"):
        assert client.get(f"/v1/cache?{query}").status_code == 422, query
    assert shown(client, "?after=7:zebra")["data"] == []


@SQLITE
def test_what_workers_never_wrote(client: FlaskClient, reporters: Reporters) -> None:
    """Redis is not believed: what is not as a worker writes it is passed over."""
    make(client, "poet", "Poet.")
    link = shown(client)["data"][0]["link"]
    redis, keys = reporters.client, reporters.keys
    for number, facts in enumerate(
        ("", "x", "[]", "{}", '{"facts": {"capacity_tokens": -1}}', '{"facts": {"load": NaN}}')
    ):
        redis.zadd(keys.named("alive"), {f"bad{number}": 4e9})
        redis.hset(keys.named("facts"), f"bad{number}", facts)
    reporters.report("gpu@a", {link: whole(10)})
    for held in ("", "1 2", "-1 2 3", "1 2 3 4", "x y z", "0 0 0", "9" * 99 + " 1 1"):
        redis.hset(keys.named("cache:gpu@a"), link, held)
        assert named(shown(client), "poet")["copies"] == []
    redis.hset(f"{keys.prefix}cache-hits:{int(redis.time()[0] // HOUR_S)}", link, "many 1 2 3 4")
    page = shown(client)
    assert (named(page, "poet")["requests"], [worker["worker"] for worker in page["workers"]]) == (0, ["gpu@a"])


@SQLITE
def test_a_silent_worker_holds_nothing(client: FlaskClient, reporters: Reporters) -> None:
    """After as long as the queue waits for it; its cache may have gone with it."""
    make(client, "poet", "Poet.")
    entry = shown(client)["data"][0]
    reporters.report("gpu@a", {entry["link"]: whole(entry["tokens"])})
    now = reporters.client.time()[0]
    reporters.client.zadd(reporters.keys.named("alive"), {"gpu@a": now - fleet.DEAD_S - 1})
    page = shown(client)
    assert (page["workers"], named(page, "poet")["copies"]) == ([], [])
    assert f"local DEAD_S = {fleet.DEAD_S:.0f}\n" in script("report")


@SQLITE
def test_redis_is_away(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing can be said; it is not shown as a fleet without caches."""
    make(client, "poet", "Poet.")
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")
    settings.cache_clear()
    app = build(settings())
    with app.extensions["closing"]:
        answer = connected(app, new_key("default")).get("/v1/cache")
    assert (answer.status_code, answer.get_json()["code"]) == (503, "queue_unavailable")


@SQLITE
def test_the_fleet_in_metrics(client: FlaskClient, reporters: Reporters) -> None:
    """Sums over the workers that live; the metrics need no key, and so name nobody."""
    reporters.report("gpu@a", {})
    reporters.report("gpu@b", {}, capacity_tokens=100, known_tokens=60, free_tokens=40)
    told = client.get("/metrics").text
    for part, tokens in (("capacity", 8292), ("known", 760), ("free", 1040)):
        assert f'metaqore_cache_tokens{{part="{part}"}} {tokens}.0\n' in told
    assert "gpu@a" not in told
