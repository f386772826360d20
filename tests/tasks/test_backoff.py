"""How long a request waits before its next attempt."""

from __future__ import annotations

import pytest

from tasks.backoff import delay_s


def test_it_doubles_up_to_its_bound() -> None:
    """From the first wait on, whatever the number of the attempt."""
    assert [delay_s(attempt, 1) for attempt in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert [delay_s(attempt, 1) for attempt in (7, 8, 10_000)] == [60, 60, 60]
    assert [delay_s(attempt, 1, first_s=5, max_s=12) for attempt in (1, 2, 3)] == [5, 10, 12]


@pytest.mark.parametrize("attempt", [1, 3, 20])
def test_chance_takes_off_up_to_a_half(attempt: int) -> None:
    """So that those that failed together do not come back together, and none comes back at once."""
    whole = delay_s(attempt, 1)
    assert delay_s(attempt, 0) == whole / 2
    assert delay_s(attempt, 0.5) == whole * 3 / 4


def test_no_wait_at_all() -> None:
    """An operator may switch it off."""
    assert delay_s(5, 0.7, first_s=0) == 0
