"""How many may wait: asked before a request is taken, in requests and tokens, in all and of one organization."""

from __future__ import annotations

import json
import random
from typing import Any, cast

import pytest
import redis

from tasks.errors import QueueFull, QueueUnavailable
from tasks.queueing.connecting import connect
from tasks.queueing.publisher import Limits, Load, Publisher
from tasks.settings import SchedulingGroup
from tests.reserving import reserve_one
from tests.services import RedisServer, wait_until
from tests.tasks.queueing.broker import TOKENS, A, B, Broker, Consumer, configured, queued


def bounded(broker: Broker, **limits: int) -> Publisher:
    """Return a publisher for a queue with limits."""
    return Publisher(broker.client, broker.keys, Limits(**limits))


def refused(publisher: Publisher, organization: str = "acme", tokens: int = TOKENS) -> int | None:
    """Return the seconds after which to come back, None if there is room."""
    try:
        publisher.room(organization, tokens)
    except QueueFull as error:
        return error.retry_after_s
    return None


def leaving(broker: Broker, requests_per_s: float, for_s: float = 1000) -> None:
    """Let requests have left the queue steadily, this many a second, for so long."""
    seconds, _ = broker.client.time()
    share = 1 - 0.5 ** (for_s / 30)
    summed = requests_per_s * 30 / 0.6931471805599453 * share
    content = {"at": seconds, "since": seconds - for_s, "requests": summed, "tokens": summed * TOKENS}
    broker.client.hset(broker.keys.named("rate"), mapping=cast("Any", content))


def test_requests(broker: Broker) -> None:
    """So many may wait; what is running does not count, and what was given back does."""
    publisher = bounded(broker, requests=2)
    tags = []
    for _ in range(2):
        assert refused(publisher) is None
        tags.append(broker.publish())
    assert refused(publisher) is not None
    assert refused(publisher, "other") is not None
    Consumer(broker, prefetch=1, holder="one").take(1)
    assert refused(publisher) is None
    broker.scripts.run("give_back", "one", tags[0], 60, b"")
    assert refused(publisher) is not None
    publisher.withdraw(tags[0])
    assert refused(publisher) is None


def test_tokens(broker: Broker) -> None:
    """Prompt tokens are bounded too; one that is alone may be of any size, or it could never run."""
    publisher = bounded(broker, tokens=2 * TOKENS)
    assert refused(publisher, tokens=100 * TOKENS) is None
    broker.publish()
    assert refused(publisher) is None
    assert refused(publisher, tokens=TOKENS + 1) is not None
    broker.publish()
    assert refused(publisher, tokens=1) is not None
    assert refused(publisher, tokens=0) is None


@pytest.mark.parametrize("limits", [{"requests_per_organization": 1}, {"tokens_per_organization": TOKENS}])
def test_of_one_organization(broker: Broker, limits: dict[str, int]) -> None:
    """One that fills its part of the queue takes nothing from another."""
    publisher = bounded(broker, **limits)
    broker.publish(organization="acme")
    assert refused(publisher, "acme") is not None
    assert refused(publisher, "other") is None
    broker.publish(B, organization="other")
    assert refused(publisher, "other") is not None


def test_no_limits(broker: Broker) -> None:
    """Zero is for any number."""
    publisher = bounded(broker)
    for _ in range(20):
        broker.publish()
        assert refused(publisher, tokens=10**9) is None


def test_publishing_is_never_refused_for_want_of_room(broker: Broker) -> None:
    """What was accepted gets in."""
    publisher = bounded(broker, requests=1)
    for _ in range(3):
        publisher.publish(queued())
    assert publisher.load() == Load(3, 3 * TOKENS, Limits(requests=1))


def test_publishing_again_changes_nothing(broker: Broker) -> None:
    """After a lost answer, while it waits, while it is delayed, and while a worker has it."""
    message = queued()
    for _ in range(3):
        broker.publisher.publish(message)
        assert (broker.waiting_tags(A), broker.counted) == ([message.tag], 1)
    consumer = Consumer(broker, holder="one")
    consumer.take(1)
    broker.publisher.publish(message)
    consumer.nothing_comes(0.1)
    broker.scripts.run("give_back", "one", message.tag, 60, b"")
    broker.publisher.publish(message)
    assert (broker.elements(A), broker.delayed, broker.counted) == ([], {message.tag}, 1)


# --- Retry-After ----------------------------------------------------------------------------------


def test_the_excess_over_the_drain_rate(broker: Broker) -> None:
    """Five too many, at half a request a second: ten seconds, and one for the request itself is among the five."""
    publisher = bounded(broker, requests=6)
    for _ in range(10):
        broker.publish()
    leaving(broker, 0.5)
    assert refused(publisher) in (10, 11)
    leaving(broker, 50)
    assert refused(publisher) == 1
    leaving(broker, 0.001)
    assert refused(publisher) == 300


def test_by_tokens(broker: Broker) -> None:
    """The larger request waits longer."""
    publisher = bounded(broker, tokens=10 * TOKENS)
    for _ in range(10):
        broker.publish()
    leaving(broker, 1)
    small, large = refused(publisher, tokens=TOKENS), refused(publisher, tokens=20 * TOKENS)
    assert small in (1, 2)
    assert large in (20, 21)


def test_an_organizations_share_of_the_rate(broker: Broker) -> None:
    """It has a quarter of what waits, so it is taken to have a quarter of what leaves."""
    publisher = bounded(broker, requests_per_organization=1)
    for organization in ("acme", "other", "other", "other"):
        broker.publish(A if organization == "acme" else B, organization=organization)
    leaving(broker, 1)
    assert refused(publisher, "acme") in (4, 5)


def test_a_young_rate(broker: Broker) -> None:
    """Three seconds after the first request left, the rate is already the right one."""
    publisher = bounded(broker, requests=1)
    for _ in range(20):
        broker.publish()
    leaving(broker, 2, for_s=3)
    # Redis' clock is read in whole seconds here, so the three may be four.
    assert 10 <= cast("int", refused(publisher)) <= 14


def test_nothing_has_left_yet(broker: Broker) -> None:
    """Nobody knows when there will be room: half a minute is said."""
    publisher = bounded(broker, requests=1)
    broker.publish()
    assert refused(publisher) == 30


def test_what_reserving_counts(broker: Broker) -> None:
    """Each request that leaves the queue, with its tokens, as time goes by worth less and less."""
    for _ in range(4):
        broker.publish(random.choice((A, B)))
    Consumer(broker).take(4)
    rate = {name: float(value) for name, value in broker.hash("rate").items()}
    assert 3 < rate["requests"] <= 4
    assert rate["tokens"] == pytest.approx(TOKENS * rate["requests"], rel=1e-6)
    assert rate["since"] <= rate["at"]
    broker.client.hset(broker.keys.named("rate"), "at", str(rate["at"] - 300))
    broker.publish()
    Consumer(broker).take(1)
    assert 1 <= float(cast("bytes", broker.client.hget(broker.keys.named("rate"), "requests"))) < 1.1


# --- Redis takes no writes ------------------------------------------------------------------------


def test_a_replica_is_not_believed(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes no writes neither has room nor knows what is missing."""
    with configured(own_redis.url, 60, monkeypatch) as broker:
        tag = broker.publish()
        broker.client.replicaof("127.0.0.1", "1")
        for ask in (
            lambda: broker.publisher.room("acme", 1),
            lambda: broker.publisher.unknown([tag, "missing"]),
            broker.publish,
        ):
            with pytest.raises(QueueUnavailable):
                ask()
        broker.client.replicaof("NO", "ONE")
        broker.publisher.room("acme", 1)
        assert broker.publisher.unknown([tag, "missing"]) == {"missing"}


def test_a_redis_without_memory(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes nothing new; what it has is taken, renewed, given back, restored and dropped, so that it becomes emptier."""
    with configured(own_redis.url, 60, monkeypatch) as broker:
        tags = [broker.publish() for _ in range(5)]
        broker.client.config_set("maxmemory", 1)
        for ask in (lambda: broker.publisher.room("acme", 1), broker.publish):
            with pytest.raises(QueueUnavailable):
                ask()
        consumer = Consumer(broker, prefetch=4, holder="one")
        assert consumer.take(4) == tags[:4]
        assert broker.scripts.run("renew", "one", *tags[:4]) == [1] * 4
        assert broker.scripts.run("give_back", "one", tags[0], 0, b"") == 1
        assert broker.scripts.run("give_back", "one", tags[1], 60, b"") == 1
        broker.client.config_set("maxmemory", 0)
        broker.end_leases(tags[2])
        broker.fall_due()
        broker.client.config_set("maxmemory", 1)
        assert broker.restore() == 1
        broker.drop(tags[3])
        broker.publisher.withdraw(tags[4])
        for message in consumer.taken[:3]:
            message.ack()
        assert sorted(consumer.take(3)) == sorted(tags[:3])
        broker.client.config_set("maxmemory", 0)
        broker.publish()
        broker.check()


def test_a_script_that_writes_nothing_leaves_nothing(broker: Broker) -> None:
    """Asking for room makes no key."""
    broker.publisher.room("acme", 1)
    assert broker.publisher.unknown(["x"]) == {"x"}
    assert broker.publisher.unknown([]) == set()
    assert broker.client.keys() == []


# --- What is counted ------------------------------------------------------------------------------


def test_a_lost_counter(broker: Broker) -> None:
    """Counting goes on from nothing, never below it, and is right again once the queue was empty."""
    for _ in range(3):
        broker.publish()
    broker.client.delete(broker.keys.named("counts"))
    consumer = Consumer(broker)
    consumer.take(3)
    assert broker.publisher.load() == Load(0, 0, Limits())
    broker.publish()
    assert broker.publisher.load() == Load(1, TOKENS, Limits())


@pytest.mark.parametrize("organization", ["ü", 'a" b', "a\nb", "a\\b", "", "x" * 200, "requests"])
def test_any_organization(broker: Broker, organization: str) -> None:
    """Whatever its name is, it is counted under it and no other."""
    publisher = bounded(broker, requests_per_organization=1)
    tag = broker.publish(organization=organization)
    assert refused(publisher, organization) is not None
    assert refused(publisher, organization + "x") is None
    broker.check()
    record = cast("bytes", broker.client.hget(broker.keys.named("messages"), tag))
    assert json.loads(record.partition(b"\n")[0])[2] == organization
    Consumer(broker).take(1)
    assert refused(publisher, organization) is None


def test_how_full_it_is() -> None:
    """By whichever limit is nearer; a queue without limits is never full."""
    assert Load(5, 10, Limits(requests=10, tokens=100)).share == 0.5
    assert Load(5, 90, Limits(requests=10, tokens=100)).share == 0.9
    assert Load(10**6, 10**9, Limits()).share == 0


def test_limits_from_the_settings() -> None:
    """Each comes from the setting of its name."""
    scheduling = SchedulingGroup(
        max_waiting=1, max_waiting_tokens=2, max_waiting_per_organization=3, max_waiting_tokens_per_organization=4
    )
    assert Limits.of(scheduling) == Limits(1, 2, 3, 4)


def test_withdrawing(broker: Broker) -> None:
    """A message that waits or is delayed is gone; one that a worker has is left to it; another is no error."""
    first, second, third, fourth = (broker.publish() for _ in range(4))
    consumer = Consumer(broker, prefetch=2, holder="one")
    consumer.take(2)
    broker.scripts.run("give_back", "one", second, 60, b"")
    for tag in (second, third, third, "unknown"):
        broker.publisher.withdraw(tag)
    broker.publisher.withdraw(first)
    assert broker.publisher.unknown([first, second, third, fourth]) == {second, third}
    assert broker.leased == {first}
    assert broker.counted == 1
    broker.fall_due()
    consumer.taken[1].ack()
    assert consumer.take(1) == [fourth]
    assert broker.client.exists(broker.keys.named("ready")) == 0


def test_withdrawn_and_published_again(broker: Broker) -> None:
    """What is left of its first place is not taken for its second: it comes once, in its turn."""
    message = queued()
    broker.publisher.publish(message)
    other = broker.publish()
    broker.publisher.withdraw(message.tag)
    broker.publisher.publish(message)
    consumer = Consumer(broker)
    assert consumer.take(2) == [other, message.tag]
    consumer.nothing_comes(0.1)


def test_thousands_withdrawn(broker: Broker) -> None:
    """A worker gets past them, in more than one step, to what is behind."""
    with broker.client.pipeline(transaction=False) as pipe:
        for number in range(2500):
            pipe.lpush(broker.keys.lists + A, f"1.000000 tag-{number}")
        pipe.zadd(broker.keys.named("ready"), {A: 1})
        pipe.execute()
    tag = broker.publish()
    assert reserve_one(broker.scripts, "one") is None
    assert Consumer(broker).take(1) == [tag]


def test_stopping(broker: Broker) -> None:
    """Who listens hears the id; without Redis it is no error."""
    with broker.client.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
        channel.subscribe(broker.keys.cancels)
        wait_until(
            lambda: dict(broker.client.pubsub_numsub(broker.keys.cancels)).get(broker.keys.cancels.encode()), 5, "it"
        )
        broker.publisher.stop("gw_1")
        heard = wait_until(lambda: channel.get_message(timeout=1), 5, "the id")
        assert heard["data"] == b"gw_1"
    Publisher(connect("redis://127.0.0.1:1/0", 0.2), broker.keys).stop("gw_1")


def test_the_socket_is_cut_while_publishing(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis that stops answering is unavailable after the time-out, and the message may or may not be there."""
    with configured(own_redis.url, 60, monkeypatch) as broker:
        impatient = Publisher(connect(own_redis.url, 0.3), broker.keys)
        impatient.publish(first := queued())
        with redis.Redis.from_url(own_redis.url) as other:
            other.execute_command("CLIENT", "PAUSE", 900, "ALL")
        with pytest.raises(QueueUnavailable):
            impatient.publish(message := queued())
        wait_until(lambda: _publishes(impatient, message), 10, "redis to go on")
        assert broker.waiting_tags(A) == [first.tag, message.tag]


def _publishes(publisher: Publisher, message: Any) -> bool:
    try:
        publisher.publish(message)
    except QueueUnavailable:
        return False
    return True
