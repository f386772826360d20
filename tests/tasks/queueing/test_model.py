"""The queue's scripts in any order, by any number of processes: always what a plain model says, and always whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tasks.queueing.pull import Wish
from tests.reserving import ANY_TOKENS
from tests.tasks.queueing.broker import Broker

LEASE_S = 60
HOLDERS = st.sampled_from(["one", "two"])
NUMBERS = st.integers(0, 1000)
DELAYS_S = st.sampled_from([0, 0, 60])
EXAMPLES, STEPS = 25, 40


@dataclass
class Message:
    """What the model knows of a message. `holder` had it last, and still has if its place is `leased`."""

    record: bytes
    turn: float
    list: str
    place: str
    holder: str | None = None
    returns: int = 0
    old: bool = False


class Queue(RuleBasedStateMachine):
    """Any order of steps. `broker` is a real Redis; `known` is the model: all messages by tag."""

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self.broker = broker
        broker.client.flushall()
        broker.sweeping(LEASE_S + 1)
        self.known: dict[str, Message] = {}
        self.ever: dict[str, tuple[Any, ...]] = {}
        #: Only what was given back may come before something older.
        self.in_order = True

    def run(self, name: str, *arguments: Any) -> Any:
        """Run a script."""
        return self.broker.scripts.run(name, *arguments)

    @initialize(count=st.integers(3, 6))
    def begin(self, count: int) -> None:
        """Have something in the queue, and something in the hands of both processes."""
        for number in range(2 * count):
            self.put("ab"[number % 2], "acme", number, 0, 1)
        for number in range(count):
            self._take(("one", "two")[number % 2])

    @rule(
        name=st.sampled_from(["a", "b", "c:high"]),
        organization=st.sampled_from(["acme", "other", 'o"\n']),
        tokens=st.integers(0, 1000),
        head_start_s=st.sampled_from([0, 30, -60]),
        count=st.integers(1, 3),
    )
    def put(self, name: str, organization: str, tokens: int, head_start_s: int, count: int) -> None:
        """Publish new messages."""
        for _ in range(count):
            tag = f"m{len(self.ever)}:1"
            # A list has one head start, as it has one priority.
            self.ever[tag] = (
                f"{name}{head_start_s}{organization}",
                tag,
                organization,
                tokens,
                head_start_s,
                f"message {tag}",
            )
            assert self.run("put", *self.ever[tag]) == 1
            self._noted(tag)

    @rule(number=NUMBERS)
    def put_again(self, number: int) -> None:
        """Publish a message once more, as after a lost answer; or anew, after it was dropped or lost."""
        tag = self._tag(number)
        known = tag in self.known
        assert self.run("put", *self.ever[tag]) == (0 if known else 1)
        if not known:
            self._noted(tag)

    @rule(holder=HOLDERS, count=st.integers(1, 3))
    def reserve(self, holder: str, count: int) -> None:
        """Take messages, one after the other."""
        for _ in range(count):
            self._take(holder)

    def _take(self, holder: str) -> None:
        """Take one message."""
        self._taken(holder, Wish(holder, room=1, budget=ANY_TOKENS))

    def _taken(self, holder: str, wish: Wish) -> None:
        """Check what was taken: the oldest of its organization's, but for what was given back, which may come before it."""
        for message in self.known.values():
            if message.place == "due":
                message.place = "waiting"
        messages, *_ = self.run("reserve", holder, wish.to_json())
        assert len(messages) <= wish.room
        if not messages:
            assert not any(message.place == "waiting" for message in self.known.values()) or not wish.room
        assert len({self.ever[tag.decode()][0] for tag, *_ in messages}) <= 1
        tokens = sum(self.ever[tag.decode()][3] for tag, *_ in messages)
        assert len(messages) <= 1 or tokens <= wish.budget
        for index, each in enumerate(messages):
            self._is_right(holder, index == 0, *each)

    def _is_right(self, holder: str, is_first: bool, name: bytes, record: bytes, returns: int) -> None:
        waiting = {tag: message for tag, message in self.known.items() if message.place == "waiting"}
        tag = name.decode()
        message = waiting[tag]
        assert (message.record, message.returns) == (record, returns)
        if self.in_order and is_first:
            own = [other.turn for known, other in waiting.items() if self.ever[known][2] == self.ever[tag][2]]
            assert message.turn == min(own)
        if message.returns == 0:
            same = [other for other in waiting.values() if other.list == message.list and other.returns == 0]
            assert message.turn == min(other.turn for other in same)
        message.place, message.holder, message.old = "leased", holder, False

    @rule(holder=HOLDERS, room=st.integers(0, 4), budget=st.sampled_from([1, 1500, ANY_TOKENS]))
    def reserve_a_batch(self, holder: str, room: int, budget: int) -> None:
        """Take as many as there is room for; with nothing in hand, one of any size."""
        self._taken(holder, Wish(holder, room, budget))

    @rule(holder=HOLDERS)
    def renew(self, holder: str) -> None:
        """Renew all there is: one's own, another's, what was restored and not taken, and what never was."""
        asked = sorted(self.ever)
        answers = self.run("renew", holder, *asked)
        for tag, answer in zip(asked, answers, strict=True):
            message = self.known.get(tag)
            if message is None:
                assert answer == -1
            elif message.holder != holder:
                assert answer == 0
            else:
                assert answer == 1
                message.place, message.old = "leased", False

    @rule(number=NUMBERS)
    def drop(self, number: int) -> None:
        """End a request, whoever has its message."""
        tag = self._tag(number)
        assert self.run("drop", tag, "unknown") == (tag in self.known)
        self.known.pop(tag, None)

    @rule(number=NUMBERS)
    def withdraw(self, number: int) -> None:
        """Forget a message unless a worker has it."""
        tag = self._tag(number)
        waits = tag in self.known and self.known[tag].place != "leased"
        assert self.run("withdraw", tag) == waits
        if waits:
            del self.known[tag]

    @rule(holder=HOLDERS, number=NUMBERS, delay_s=DELAYS_S)
    def give_back(self, holder: str, number: int, delay_s: int) -> None:
        """Give a message back, one's own or another's; a second time does nothing."""
        tag = self._tag(number)
        message = self.known.get(tag)
        mine = message is not None and message.holder == holder
        assert self.run("give_back", holder, tag, delay_s, b"") == mine
        assert self.run("give_back", holder, tag, delay_s, b"") == 0
        if message is not None and mine:
            self._returned(message, "delayed" if delay_s else "waiting")
            message.holder = None

    @rule(holder=HOLDERS, number=NUMBERS)
    def refuse(self, holder: str, number: int) -> None:
        """Set a message aside, one's own or another's."""
        tag = self._tag(number)
        message = self.known.get(tag)
        mine = message is not None and message.holder == holder
        assert self.run("refuse", holder, tag, "why") == mine
        if mine:
            del self.known[tag]

    @rule(some=st.integers(0, 15))
    def time_passes(self, some: int) -> None:
        """Some leases are not renewed for too long, and some delays are over."""
        for index, (tag, message) in enumerate(self.known.items()):
            if some >> (index % 4) & 1 and message.place == "leased" and not message.old:
                self.broker.client.zincrby(self.broker.keys.named("leases"), -LEASE_S - 1, tag)
                message.old = True
            elif some >> (index % 4) & 1 and message.place == "delayed":
                self.broker.fall_due(tag)
                message.place = "due"

    @rule(some=st.integers(1, 15), holder=HOLDERS)
    def silence(self, some: int, holder: str) -> None:
        """Some leases end and are swept up, and what one of the processes had comes back to it before it is taken."""
        self._take(holder)
        self.time_passes(some)
        self.sweep()
        self.renew(holder)

    @rule()
    def sweep(self) -> None:
        """What was not renewed waits again; its holder stays noted until somebody else takes it."""
        ended = [message for message in self.known.values() if message.place == "leased" and message.old]
        assert self.run("restore", LEASE_S, 1000, 10) == len(ended)
        for message in ended:
            self._returned(message, "waiting")

    @rule(chance=st.integers(0, 3))
    def flush(self, chance: int) -> None:
        """Redis loses everything, now and then; each process adopts what it has, and no other may."""
        if chance:
            return
        self.broker.client.flushall()
        self.broker.sweeping(LEASE_S + 1)
        leased = {tag: message for tag, message in self.known.items() if message.place == "leased"}
        self.known.clear()
        for tag, message in leased.items():
            holder = cast("str", message.holder)
            assert self.run("renew", holder, tag) == [-1]
            assert self.run("adopt", holder, tag, message.record) == 1
            assert self.run("adopt", "another", tag, message.record) == 0
            self.known[tag] = Message(message.record, message.turn, message.list, "leased", holder)
        # What they come back with is older than what is put from now on, and returns are counted anew.
        self.in_order = False

    @rule()
    def steal_the_marker(self) -> None:
        """A worker that was woken dies before it takes anything."""
        self.broker.client.delete(self.broker.keys.wake)

    @invariant()
    def whole(self) -> None:
        """The keys are whole, and say what the model says."""
        self.broker.check()
        assert self.broker.leased == {tag for tag, message in self.known.items() if message.place == "leased"}
        assert self.broker.delayed == {tag for tag, one in self.known.items() if one.place in ("delayed", "due")}
        assert self.broker.publisher.unknown(list(self.ever)) == set(self.ever) - set(self.known)
        assert self.broker.hash("holders") == {
            tag: message.holder for tag, message in self.known.items() if message.holder
        }
        returns = {tag: int(count) for tag, count in self.broker.hash("returns").items()}
        assert returns == {tag: message.returns for tag, message in self.known.items() if message.returns}
        load = self.broker.publisher.load()
        waiting = [self.ever[tag][3] for tag, message in self.known.items() if message.place != "leased"]
        assert (load.requests, load.tokens) == (len(waiting), sum(waiting))

    def _tag(self, number: int) -> str:
        """Return one of the tags there are, or now and then of those there ever were."""
        tags = sorted(self.known) if self.known and number % 5 else sorted(self.ever)
        return tags[number % len(tags)]

    def _noted(self, tag: str) -> None:
        record = cast("bytes", self.broker.client.hget(self.broker.keys.named("messages"), tag))
        turn, name, *_ = json.loads(record.partition(b"\n")[0])
        self.known[tag] = Message(record, float(turn), name, "waiting")

    def _returned(self, message: Message, place: str) -> None:
        message.place, message.old = place, False
        message.returns += 1
        self.in_order = False


def test_any_order_of_steps(broker: Broker) -> None:
    """After every single step of random ones. Hypothesis prints how to repeat what it finds."""
    run_state_machine_as_test(
        cast("Any", lambda: Queue(broker)),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    broker.client.flushall()
