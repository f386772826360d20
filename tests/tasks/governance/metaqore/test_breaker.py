"""The circuit breaker, by a clock that the test turns."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.governance.metaqore.breaker import Breaker


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(clock: Clock, failures: int = 3) -> Breaker:
    """Return a breaker that has just opened, for 10 s."""
    breaker = Breaker(failures, 10.0, clock)
    for _ in range(failures):
        ticket = breaker.admit()
        assert ticket is not None
        breaker.record(ticket, "timeout")
    return breaker


def test_failures_in_a_row_open_it() -> None:
    """A success in between begins the count anew."""
    breaker = Breaker(3, 10.0, Clock())
    for failure in ("timeout", "timeout", None, "timeout", "timeout"):
        ticket = breaker.admit()
        assert ticket is not None
        breaker.record(ticket, failure)
    ticket = breaker.admit()
    assert ticket is not None
    breaker.record(ticket, "timeout")
    assert breaker.admit() is None


def test_it_stays_open_for_its_time_and_then_lets_one_probe_through() -> None:
    """While the probe is under way, everybody else is still kept away."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += 9.99
    assert breaker.admit() is None
    clock.now += 0.01
    assert breaker.admit() is not None
    assert breaker.admit() is None
    clock.now += 1000
    assert breaker.admit() is None, "a probe is bounded by its own timeout, not by the breaker's"


@pytest.mark.parametrize("recovers", [True, False])
def test_the_probe_decides(recovers: bool) -> None:
    """Its success closes the breaker; its failure, alone, opens it for the same time again."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += 10
    ticket = breaker.admit()
    assert ticket is not None
    breaker.record(ticket, None if recovers else "timeout")
    if recovers:
        again = breaker.admit()
        assert again is not None
        breaker.record(again, "timeout")
        assert breaker.admit() is not None, "the count begins anew"
    else:
        clock.now += 9.9
        assert breaker.admit() is None
        clock.now += 0.1
        assert breaker.admit() is not None


@pytest.mark.parametrize("late", [None, "timeout"])
def test_a_call_from_before_does_not_speak_for_the_probe(late: str | None) -> None:
    """What was let through before the breaker opened may end at any time afterwards."""
    clock = Clock()
    breaker = Breaker(1, 10.0, clock)
    slow, quick = breaker.admit(), breaker.admit()
    assert slow is not None
    assert quick is not None
    breaker.record(quick, "timeout")
    assert breaker.admit() is None
    clock.now += 10
    assert breaker.admit() is not None
    breaker.record(slow, late)
    assert breaker.admit() is None, "the probe is still under way"


def test_it_says_when_it_opens_and_when_the_server_is_back(caplog: pytest.LogCaptureFixture) -> None:
    """Once each, and with the last failure."""
    clock = Clock()
    with caplog.at_level(logging.WARNING):
        breaker = opened(clock)
        for _ in range(3):
            clock.now += 10
            ticket = breaker.admit()
            assert ticket is not None
            breaker.record(ticket, "server_error")
        clock.now += 10
        ticket = breaker.admit()
        assert ticket is not None
        breaker.record(ticket, None)
    assert [record.msg for record in caplog.records] == [
        {"event": "MetaQore failed several times in a row", "count": 3, "code": "timeout"},
        {"event": "MetaQore answers again"},
    ]


@given(st.lists(st.floats(0, 6), max_size=100), st.integers(1, 5))
def test_a_server_that_always_fails_is_asked_seldom(waits: list[float], failures: int) -> None:
    """However often somebody wants to: its failures in the beginning, then once in the time it is left alone for."""
    clock = Clock()
    breaker, let_through = Breaker(failures, 10.0, clock), 0
    for wait in waits:
        clock.now += wait
        if (ticket := breaker.admit()) is not None:
            let_through += 1
            breaker.record(ticket, "timeout")
    assert let_through <= failures + (clock.now - 100.0) / 10.0
    clock.now += 10.0
    assert breaker.admit() is not None, "it is asked again in the end"
