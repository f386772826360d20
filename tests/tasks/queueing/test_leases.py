"""A process keeps what it runs, and lets go of what ended, through anything that Redis does."""

from __future__ import annotations

import random
import threading
import time

import pytest

from tasks.metrics.making import INSTRUMENTS
from tasks.queueing.connecting import connect
from tasks.queueing.leases import Leases, grace_s, process_holder, renewal_s
from tests.reserving import reserve_one
from tests.services import RedisServer, wait_until
from tests.tasks.queueing.broker import A, B, Broker, configured

#: So that leases are renewed every tenth of a second.
SHORT_S = 0.3


def take(broker: Broker, holder: str) -> tuple[str, bytes]:
    """Reserve a message, and return its tag and record."""
    taken = reserve_one(broker.scripts, holder)
    assert taken is not None
    tag, record, _returns = taken
    return tag.decode(), record


def score(broker: Broker, tag: str) -> float:
    """Return when a lease was last renewed; 0 if there is none."""
    return broker.client.zscore(broker.keys.named("leases"), tag) or 0.0


def test_what_is_held_is_renewed(broker: Broker) -> None:
    """Again and again, for as long as it is held: a short lease carries a long request. What is not held is not renewed."""
    leases, lost = broker.leases("one", SHORT_S)
    first, second = broker.publish(), broker.publish()
    tag, record = take(broker, "one")
    take(broker, "one")
    leases.hold(tag, record)
    not_held = score(broker, second)
    for _ in range(4):
        before = score(broker, first)
        wait_until(lambda before=before: score(broker, first) > before, 5, "a renewal")  # type: ignore[misc]
    assert score(broker, second) == not_held
    assert (set(leases.held), lost) == ({first}, [])


def test_what_ended_is_forgotten(broker: Broker) -> None:
    """At once, wherever it is; it is not held any more, and nothing of it stays in Redis."""
    leases, lost = broker.leases("one", SHORT_S)
    broker.publish()
    tag, record = take(broker, "one")
    leases.hold(tag, record)
    leases.drop(tag)
    leases.drop("never there")
    assert leases.held == frozenset()
    wait_until(lambda: broker.publisher.unknown([tag]), 5, "the message to be forgotten")
    assert lost == []
    assert broker.client.exists(*map(broker.keys.named, ("messages", "leases", "holders", "returns"))) == 0


def test_what_is_given_back(broker: Broker) -> None:
    """It waits again, before what came after it, and says how often it came back; a delay holds it up."""
    leases, _ = broker.leases("one")
    first, second = broker.publish(), broker.publish()
    tag, record = take(broker, "one")
    leases.hold(tag, record)
    leases.give_back(tag)
    wait_until(lambda: broker.waiting_tags(A) == [first, second], 5, "the message to wait")
    assert reserve_one(broker.scripts, "two") == [first.encode(), record, 1]
    assert leases.held == frozenset()
    tag, record = take(broker, "one")
    leases.hold(tag, record)
    leases.give_back(tag, 60)
    wait_until(lambda: broker.delayed == {second}, 5, "the message to be delayed")
    assert reserve_one(broker.scripts, "two") is None
    broker.fall_due()
    assert reserve_one(broker.scripts, "two") == [second.encode(), record, 1]


def test_a_delay_passes_by_itself(broker: Broker) -> None:
    """What was given back for a tenth of a second is there after it."""
    leases, _ = broker.leases("one")
    broker.publish()
    tag, record = take(broker, "one")
    leases.hold(tag, record)
    leases.give_back(tag, 0.1)
    wait_until(lambda: broker.delayed, 5, "the message to be delayed")
    assert wait_until(lambda: reserve_one(broker.scripts, "two"), 5, "the message to fall due")[0] == tag.encode()


def test_what_cannot_be_read_is_set_aside(broker: Broker) -> None:
    """With the reason and its beginning, for whoever wants to know; the last hundred are kept."""
    leases, _ = broker.leases("one")
    tags = [broker.publish() for _ in range(105)]
    for _ in tags:
        leases.hold(*take(broker, "one"))
    for number, tag in enumerate(tags):
        leases.refuse(tag, f"reason {number}")
    wait_until(lambda: set(tags) == broker.publisher.unknown(tags), 10, "the messages to go")
    assert len(broker.refused) == 100
    assert {entry.split(b"\n")[0] for entry in broker.refused} == {
        f"reason {number}".encode() for number in range(5, 105)
    }
    assert tags[104].encode() in broker.refused[0] or tags[104].encode() in b"".join(broker.refused)


def test_a_lease_belongs_to_one_process(broker: Broker) -> None:
    """Another can neither renew it, nor give it back, nor set it aside."""
    tag = broker.publish()
    take(broker, "one")
    before = score(broker, tag)
    assert broker.scripts.run("renew", "two", tag) == [0]
    assert broker.scripts.run("give_back", "two", tag, 0, b"") == 0
    assert broker.scripts.run("refuse", "two", tag, "no") == 0
    assert broker.scripts.run("adopt", "two", tag, b"record") == 0
    assert score(broker, tag) == before
    assert broker.client.hget(broker.keys.named("holders"), tag) == b"one"


def test_a_lost_lease_is_told(broker: Broker) -> None:
    """Once, to the process that lost it; the others' leases go on."""
    leases, lost = broker.leases("one", SHORT_S)
    kept, gone = broker.publish(), broker.publish(B)
    for _ in range(2):
        leases.hold(*take(broker, "one"))
    broker.client.hset(broker.keys.named("holders"), gone, "two")
    wait_until(lambda: lost, 5, "the loss")
    before = score(broker, kept)
    wait_until(lambda: score(broker, kept) > before, 5, "a renewal")
    assert (lost, set(leases.held)) == ([gone], {kept})


def test_a_callback_that_fails(broker: Broker) -> None:
    """What the worker does about a loss must not end the renewing of all else."""
    done = threading.Event()

    def fail(_tag: str) -> None:
        done.set()
        raise RuntimeError

    leases = Leases(lambda: connect(broker.url, 2), broker.keys, "one", SHORT_S, fail)
    leases.start()
    try:
        kept, gone = broker.publish(), broker.publish(B)
        for _ in range(2):
            leases.hold(*take(broker, "one"))
        broker.client.hset(broker.keys.named("holders"), gone, "two")
        assert done.wait(5)
        before = score(broker, kept)
        wait_until(lambda: score(broker, kept) > before, 5, "a renewal")
    finally:
        leases.close()


def test_what_was_restored_and_not_taken_goes_on(broker: Broker) -> None:
    """A worker that was held up for longer than a lease has its message back, if nobody has taken it: it runs once."""
    leases, lost = broker.leases("one", SHORT_S)
    tag = broker.publish()
    other = broker.publish()
    record = take(broker, "one")[1]
    broker.end_leases()
    assert broker.restore() == 1
    assert broker.waiting_tags(A) == [tag, other]
    leases.hold(tag, record)
    wait_until(lambda: broker.leased == {tag}, 5, "the lease")
    broker.check()
    assert take(broker, "two")[0] == other
    assert reserve_one(broker.scripts, "two") is None
    assert lost == []


def test_what_was_given_back_is_not_taken_again(broker: Broker) -> None:
    """A renewal that comes after it, as of a process that has not heard: the lease is lost, wherever the message is."""
    for delay_s in (0, 60):
        tag = broker.publish()
        take(broker, "one")
        assert broker.scripts.run("give_back", "one", tag, delay_s, b"") == 1
        assert broker.scripts.run("give_back", "one", tag, delay_s, b"") == 0
        assert broker.scripts.run("renew", "one", tag) == [0]
        broker.check()
        broker.drop(tag)


def test_redis_loses_its_data(broker: Broker) -> None:
    """What runs is leased again, with its message; what was dropped is not made again."""
    leases, lost = broker.leases("one", SHORT_S)
    tags = {broker.publish(random.choice((A, B))) for _ in range(3)}
    for _ in range(3):
        leases.hold(*take(broker, "one"))
    dropped = tags.pop()
    leases.drop(dropped)
    wait_until(lambda: broker.publisher.unknown([dropped]), 5, "the drop")
    message = broker.message(min(tags))
    broker.client.flushall()
    broker.client.script_flush()
    wait_until(lambda: broker.leased == tags, 5, "the leases")
    assert broker.message(min(tags)) == message
    assert broker.publisher.unknown([*tags, dropped]) == {dropped}
    assert lost == []
    broker.end_leases()
    leases.close()
    broker.restore()
    assert {take(broker, "two")[0] for _ in range(2)} == tags


def test_renewals_are_told(broker: Broker) -> None:
    """How many Redis has confirmed, what was lost to others or to Redis, and since when none was confirmed."""

    def told(name: str) -> float:
        return INSTRUMENTS["worker"].get_sample_value(f"metaqore_{name}_total") or 0.0

    names = ("lease_renewals", "leases_lost", "leases_adopted")
    before = {name: told(name) for name in names}
    idle = Leases(lambda: connect(broker.url, 2.0), broker.keys, "idle", SHORT_S, print)
    assert idle.renewal_age_s == 0
    leases, lost = broker.leases("one", SHORT_S)
    kept, gone = broker.publish(), broker.publish(B)
    for _ in range(2):
        leases.hold(*take(broker, "one"))
    wait_until(lambda: told("lease_renewals") >= before["lease_renewals"] + 2, 5, "a renewal")
    broker.client.hset(broker.keys.named("holders"), gone, "two")
    wait_until(lambda: lost, 5, "the loss")
    broker.client.flushall()
    wait_until(lambda: broker.leased == {kept}, 5, "the lease")
    assert (told("leases_lost"), told("leases_adopted")) == (before["leases_lost"] + 1, before["leases_adopted"] + 1)
    wait_until(lambda: leases.renewal_age_s < SHORT_S, 5, "a renewal of this moment")


def test_given_back_to_a_redis_that_lost_its_data(broker: Broker) -> None:
    """It waits there all the same."""
    leases, _ = broker.leases("one")
    tag = broker.publish()
    record = take(broker, "one")[1]
    leases.hold(tag, record)
    broker.client.flushall()
    leases.give_back(tag)
    wait_until(lambda: broker.waiting_tags(A) == [tag], 5, "the message")
    assert reserve_one(broker.scripts, "two") == [tag.encode(), record, 1]


def test_redis_is_away(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it; when it is back, all that ended meanwhile is told, and the rest goes on."""
    with configured(own_redis.url, 60, monkeypatch) as broker:
        leases, lost = broker.leases("one", SHORT_S)
        tags = [broker.publish() for _ in range(4)]
        for _ in tags:
            leases.hold(*take(broker, "one"))
        own_redis.kill()
        began = time.monotonic()
        leases.drop(tags[0])
        leases.give_back(tags[1])
        leases.give_back(tags[2], 60)
        assert time.monotonic() - began < 1
        own_redis.start()
        wait_until(lambda: broker.publisher.unknown([tags[0]]), 10, "the drop")
        wait_until(lambda: (broker.waiting_tags(A), broker.delayed) == ([tags[1]], {tags[2]}), 10, "the others")
        before = score(broker, tags[3])
        wait_until(lambda: score(broker, tags[3]) > before, 10, "a renewal")
        assert lost == []
        broker.check()


def test_a_redis_that_takes_no_writes(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is given up while it is a replica; everything goes on afterwards."""
    with configured(own_redis.url, 60, monkeypatch) as broker:
        leases, lost = broker.leases("one", SHORT_S)
        kept, ended = broker.publish(), broker.publish()
        for _ in range(2):
            leases.hold(*take(broker, "one"))
        broker.client.replicaof("127.0.0.1", "1")
        before = score(broker, kept)
        leases.drop(ended)
        time.sleep(2 * SHORT_S)
        broker.client.replicaof("NO", "ONE")
        wait_until(lambda: broker.publisher.unknown([ended]), 10, "the drop")
        wait_until(lambda: score(broker, kept) > before, 10, "a renewal")
        assert lost == []


def test_a_dropped_connection(broker: Broker) -> None:
    """The thread connects anew; no lease is lost by it."""
    leases, lost = broker.leases("one", SHORT_S)
    tag = broker.publish()
    leases.hold(*take(broker, "one"))
    for _ in range(3):
        broker.client.client_kill_filter(_type="normal", skipme=True)
        before = score(broker, tag)
        wait_until(lambda before=before: score(broker, tag) > before, 10, "a renewal")  # type: ignore[misc]
    assert lost == []


def test_held_again_while_its_end_is_untold(broker: Broker) -> None:
    """The message was delivered anew, so Redis has heard the end; saying it again would take the new run's lease."""
    leases = Leases(lambda: connect(broker.url, 2), broker.keys, "one", SHORT_S, lambda _tag: None)
    tag = broker.publish()
    record = take(broker, "one")[1]
    leases.hold(tag, record)
    # The thread is not started yet: so this is not told before the message is held again.
    leases.give_back(tag)
    leases.hold(tag, record)
    leases.start()
    before = score(broker, tag)
    wait_until(lambda: score(broker, tag) > before, 5, "a renewal")
    leases.close()
    assert broker.leased == {tag}


def test_an_end_that_redis_refuses(broker: Broker) -> None:
    """It holds up neither the ends of others nor any renewal, and is told once Redis takes it."""
    leases, _ = broker.leases("one", SHORT_S)
    stuck, kept, ended = broker.publish(), broker.publish(B), broker.publish(B)
    for _ in range(3):
        leases.hold(*take(broker, "one"))
    broker.client.set(broker.keys.lists + A, "text")
    leases.give_back(stuck)
    leases.give_back(ended)
    wait_until(lambda: broker.waiting_tags(B) == [ended], 5, "the other end")
    before = score(broker, kept)
    wait_until(lambda: score(broker, kept) > before, 5, "a renewal")
    broker.client.flushall()
    wait_until(lambda: broker.waiting_tags(A) == [stuck], 5, "the end")


def test_released(broker: Broker) -> None:
    """It is another's: neither renewed nor dropped by this process any more."""
    leases, _ = broker.leases("one", SHORT_S)
    mine, other = broker.publish(), broker.publish()
    for _ in range(2):
        leases.hold(*take(broker, "one"))
    leases.release(other)
    left = score(broker, other)
    before = score(broker, mine)
    wait_until(lambda: score(broker, mine) > before, 5, "a renewal")
    assert score(broker, other) == left
    assert leases.held == {mine}


def test_closing(broker: Broker) -> None:
    """What ended is told before; what is held stays leased, and ages from now on."""
    leases, _ = broker.leases("one", SHORT_S)
    kept, ended = broker.publish(), broker.publish()
    for _ in range(2):
        leases.hold(*take(broker, "one"))
    leases.give_back(ended)
    leases.close()
    assert (broker.leased, broker.waiting_tags(A)) == ({kept}, [ended])
    leases.close()


def test_closing_while_redis_is_away(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for as long as was said, and no longer."""
    with configured(own_redis.url, 60, monkeypatch) as broker:
        leases, _ = broker.leases("one", SHORT_S)
        tag = broker.publish()
        leases.hold(*take(broker, "one"))
        own_redis.kill()
        leases.drop(tag)
        began = time.monotonic()
        leases.close(0.5)
        assert 0.4 < time.monotonic() - began < 5
        own_redis.start()


def test_closing_what_was_not_started(broker: Broker) -> None:
    """A worker that cannot start ends all the same."""
    Leases(lambda: connect(broker.url, 2), broker.keys, "one", 60, lambda _tag: None).close()


def test_hundreds_at_once(broker: Broker) -> None:
    """More than fit one call: all are renewed, all are adopted, all are dropped."""
    leases, lost = broker.leases("one", SHORT_S)
    tags = {broker.publish(random.choice((A, B))) for _ in range(600)}
    for _ in tags:
        leases.hold(*take(broker, "one"))
    broker.client.flushall()
    wait_until(lambda: broker.leased == tags, 20, "all leases")
    oldest = max(score(broker, tag) for tag in tags)
    wait_until(lambda: min(score(broker, tag) for tag in tags) > oldest, 20, "all renewals")
    for tag in tags:
        leases.drop(tag)
    wait_until(lambda: not broker.leased, 20, "all drops")
    assert lost == []


@pytest.mark.parametrize(("lease_s", "expected"), [(60, 2.0), (3, 1.0), (6, 2.0), (1, 1 / 3)])
def test_how_often(lease_s: float, expected: float) -> None:
    """Three times a lease, and every two seconds at least."""
    assert renewal_s(lease_s) == pytest.approx(expected)


@pytest.mark.parametrize(("lease_s", "expected"), [(60, 10.0), (12, 10.0), (3, 3.0), (1, 1.0)])
def test_how_long_all_may_take(lease_s: float, expected: float) -> None:
    """Five renewals, and no longer than a lease."""
    assert grace_s(lease_s) == pytest.approx(expected)


def test_a_process_has_one_name() -> None:
    """And a random one."""
    assert process_holder() == process_holder()
    assert len(process_holder()) == 16


def test_a_redis_error_that_is_none_of_these(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """A key of the wrong type is reported, and the thread tries on until it is mended."""
    leases, _ = broker.leases("one", SHORT_S)
    tag = broker.publish()
    leases.hold(*take(broker, "one"))
    broker.client.rename(broker.keys.named("leases"), "elsewhere")
    broker.client.set(broker.keys.named("leases"), "text")
    wait_until(lambda: "ResponseError" in caplog.text, 5, "a complaint")
    broker.client.rename("elsewhere", broker.keys.named("leases"))
    before = score(broker, tag)
    wait_until(lambda: score(broker, tag) > before, 5, "a renewal")
