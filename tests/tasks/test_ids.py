"""Ids carry the order of time: partitions, listings and retention all take it from there."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.ids import PREFIX, is_request_id, lower_bound, new_request_id

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: The lowest and the highest bits an id may have beside its time.
TAILS = ("7000" + "8" + "0" * 15, "7fff" + "b" + "f" * 15)
instants = st.datetimes(
    min_value=datetime(2020, 1, 1),
    max_value=datetime(2200, 1, 1),
    timezones=st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)

near_instants = instants.map(lambda moment: moment.replace(year=2020 + moment.year % 18, day=min(moment.day, 28)))


def made_at(moment: datetime, tail: str) -> str:
    """Return the id that a UUIDv7 of this instant gives, with the exact milliseconds of integers."""
    return f"{PREFIX}{(moment - EPOCH) // timedelta(milliseconds=1):012x}{tail}"


def test_form_and_time() -> None:
    """An id has the one form that is accepted, fits its column, and says when it was made."""
    before = datetime.now(UTC)
    request_id = new_request_id()
    after = datetime.now(UTC)
    assert is_request_id(request_id)
    assert len(request_id) == 35
    assert made_at(before, "") <= request_id[: len(PREFIX) + 12] <= made_at(after, "")


@pytest.mark.parametrize(
    "change",
    [str.upper, str.title, lambda text: text[:-1], lambda text: text + "0", lambda text: text.removeprefix(PREFIX),
     lambda text: text + "\n", lambda text: " " + text, lambda text: text[:15] + "4" + text[16:],
     lambda text: text[:19] + "c" + text[20:], lambda text: text[:10] + "g" + text[11:],
     lambda text: text[:10] + "٣" + text[11:], lambda _text: "", lambda text: text[:10] + "-" + text[11:]],
)  # fmt: skip
def test_other_forms_are_refused(change: object) -> None:
    """Ids go to SQL, logs and keys as they are, so that nothing but an id may pass for one."""
    assert callable(change)
    assert not is_request_id(change(new_request_id()))


def test_sorted_is_the_order_of_creation() -> None:
    """Also within a millisecond."""
    made = [new_request_id() for _ in range(20_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_threads_make_no_id_twice_and_each_sees_its_own_in_order() -> None:
    """The threads of one gateway draw from the same generator."""
    made: list[list[str]] = [[] for _ in range(8)]
    start = threading.Barrier(len(made))

    def make(ids: list[str]) -> None:
        start.wait()
        ids.extend(new_request_id() for _ in range(2000))

    threads = [threading.Thread(target=make, args=(ids,)) for ids in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({request_id for ids in made for request_id in ids}) == 16_000
    for ids in made:
        assert ids == sorted(ids)


def test_forked_processes_make_no_id_twice() -> None:
    """A web server forks its workers: a copied random generator would give both the same ids."""
    new_request_id()
    read_end, write_end = os.pipe()
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                os.write(write_end, "".join(new_request_id() + "\n" for _ in range(200)).encode())
            finally:
                os._exit(0)
        children.append(child)
    os.close(write_end)
    with os.fdopen(read_end, encoding="ascii") as pipe:
        made = pipe.read().split()
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert len(made) == 800
    # Not only the whole ids differ, but their random ends too: the clock must not be what saves us.
    assert len({request_id[-12:] for request_id in made}) == 800


@given(instants, st.sampled_from(TAILS))
def test_lower_bound_is_before_all_that_follows(moment: datetime, tail: str) -> None:
    """Every id made at that instant or later sorts after the bound, or equal to nothing of it."""
    bound = lower_bound(moment)
    assert bound < made_at(moment, tail)
    assert bound < made_at(moment + timedelta(milliseconds=1), tail)


# From 2038 on, the milliseconds of a float are no longer exact, and a bound may be one of them too early.
@given(near_instants, st.sampled_from(TAILS))
@example(datetime(2026, 1, 1, 0, 0, 0, 1000, tzinfo=UTC), TAILS[1])
@example(datetime(2026, 1, 1, 0, 0, 0, 9999, tzinfo=UTC), TAILS[1])
def test_lower_bound_is_after_all_that_came_before(moment: datetime, tail: str) -> None:
    """Every id made a millisecond before that instant sorts before the bound."""
    assert made_at(moment - timedelta(milliseconds=1), tail) < lower_bound(moment)


@given(st.integers(2020, 2199), st.integers(1, 12), instants, st.sampled_from(TAILS))
def test_partitions_of_months_meet(year: int, month: int, moment: datetime, tail: str) -> None:
    """With the bounds of whole months, an id lies in the partition of its UTC month: in that one alone."""
    start = datetime(year, month, 1, tzinfo=UTC)
    end = datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)
    for made in (moment, start, end, end - timedelta(milliseconds=1), start - timedelta(microseconds=1)):
        inside = lower_bound(start) <= made_at(made, tail) < lower_bound(end)
        assert inside == (start <= made < end)
