"""What the disk tier holds, against a naive model."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from worker_gpu.engines.disk_tier_grants import Grants
from worker_gpu.engines.disk_tier_index import Block, DiskIndex

CAPACITY = 5
KEYS = st.lists(st.sampled_from([bytes([number]) for number in range(9)]), max_size=7)


def test_a_prompt_is_evicted_from_its_end() -> None:
    """Used from the last block to the first, a prompt keeps its beginning longest."""
    index = DiskIndex(3)
    keys = [b"1", b"2", b"3"]
    assert index.begin("a", keys) == (keys, [])
    for key in reversed(keys):
        index.end(key, written=True)
    assert index.begin("a", [b"4"]) == ([b"4"], [("a", b"3")])


def test_what_was_found_is_cut_to_what_there_may_be() -> None:
    """A bound that was lowered holds from the start on; the longest unused go."""
    index = DiskIndex(2)
    assert index.load([("a", b"1"), ("b", b"2"), ("a", b"3")]) == [("a", b"1")]
    assert index.of("a") == [b"3"]
    assert not index.holds("a", b"2")
    assert index.holds("b", b"2")


class AgainstAModel(RuleBasedStateMachine):
    """Any order of uses: a list in the order of use, and a set of what is being written."""

    def __init__(self) -> None:
        super().__init__()
        self.capacity = CAPACITY
        self.index = DiskIndex(self.capacity)
        self.held: list[bytes] = []
        self.writing: set[bytes] = set()

    @rule(keys=KEYS)
    def begin(self, keys: list[bytes]) -> None:
        fresh = [key for key in dict.fromkeys(keys) if key not in self.held and key not in self.writing]
        fresh = fresh[: max(0, self.capacity - len(self.writing))]
        self.writing |= set(fresh)
        begun, evicted = self.index.begin("a", keys)
        assert begun == fresh
        self.check_evicted(evicted)

    def check_evicted(self, evicted: list[Block]) -> None:
        """Check that these are the longest unused, as many as are too many."""
        too_many = max(0, len(self.held) + len(self.writing) - self.capacity)
        assert evicted == [("a", key) for key in self.held[:too_many]]
        self.held = self.held[too_many:]

    @rule(written=st.booleans(), data=st.data())
    def end(self, written: bool, data: st.DataObject) -> None:
        if self.writing:
            key = data.draw(st.sampled_from(sorted(self.writing)))
            self.writing.remove(key)
            self.index.end(key, written=written)
            if written:
                self.held.append(key)

    @rule(keys=KEYS)
    def use(self, keys: list[bytes]) -> None:
        self.index.use(keys)
        for key in keys:
            if key in self.held:
                self.held.remove(key)
                self.held.append(key)

    @rule(count=st.integers(0, 2))
    def shrink(self, count: int) -> None:
        self.capacity = max(0, len(self.held) + len(self.writing) - count)
        self.check_evicted(self.index.shrink(count))

    @rule(key=st.sampled_from([bytes([number]) for number in range(9)]))
    def drop(self, key: bytes) -> None:
        assert self.index.drop(key) == (key in self.held)
        if key in self.held:
            self.held.remove(key)

    @invariant()
    def same(self) -> None:
        assert self.index.keys() == self.held
        assert len(self.index) == len(self.held) + len(self.writing) <= CAPACITY


TestAgainstAModel = AgainstAModel.TestCase


def test_blocks_under_way_do_not_push_one_another_out() -> None:
    """There is a limit for all requests together, none is granted twice, and requests that are done make room."""
    grants = Grants(3)
    assert [grants.grant("a", key) for key in (b"1", b"2", b"1")] == [True, True, False]
    assert [grants.grant("b", key) for key in (b"1", b"2")] == [True, False]
    grants.end("a")
    grants.end("nobody")
    assert [grants.grant("b", key) for key in (b"1", b"2", b"3", b"4")] == [False, True, True, False]
