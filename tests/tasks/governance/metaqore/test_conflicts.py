"""Unresolved conflicts, wherever in the project they are: the whole list, page by page, beside the blocking report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tasks.governance.metaqore.answers import Conflict, ConflictPage
from tasks.governance.metaqore.conflicts import MAX_PAGES, PAGE_SIZE, Listing, read_all
from tasks.governance.metaqore.outcomes import Condition
from tests.metaqore_failures import FAILURES
from tests.metaqore_stand_in import StandIn, artifact, conflict
from tests.tasks.governance.metaqore.conftest import Ask
from tests.tasks.governance.metaqore.test_projects import P1, standing

Server = Callable[[int], ConflictPage | Condition]


def listing(server: Server) -> tuple[Listing, list[int]]:
    """Return what is read of a server, and which pages it was asked for."""
    asked: list[int] = []

    async def page(number: int) -> ConflictPage | Condition:
        asked.append(number)
        await asyncio.sleep(0)
        return server(number)

    async def read() -> Listing:
        return await read_all(page)

    return asyncio.run(read()), asked


def page_of(numbers: range, total: int) -> ConflictPage:
    """Return a page with the conflicts of these numbers."""
    found = (Conflict(id=f"conf_{number:012x}", severity="low") for number in numbers)
    return ConflictPage(conflicts=tuple(found), total=total)


def pages(count: int, size: int = PAGE_SIZE, honoured: bool = True) -> Server:
    """Return a server of so many conflicts. One that does not honour pages gives the first again and again."""

    def server(number: int) -> ConflictPage:
        start = (number - 1) * size if honoured else 0
        return page_of(range(start, min(start + size, count)), count)

    return server


@pytest.mark.parametrize(
    ("count", "size", "calls", "read"),
    [
        (0, PAGE_SIZE, 1, 0),
        (PAGE_SIZE, PAGE_SIZE, 1, PAGE_SIZE),
        (PAGE_SIZE + 1, PAGE_SIZE, 2, PAGE_SIZE + 1),
        (250, 25, 10, 250),  # A server with a limit of its own.
        (5000, 5000, 1, 5000),  # One that knows no pages.
        (PAGE_SIZE * MAX_PAGES, PAGE_SIZE, MAX_PAGES, PAGE_SIZE * MAX_PAGES),
        (PAGE_SIZE * MAX_PAGES + 7, PAGE_SIZE, MAX_PAGES, PAGE_SIZE * MAX_PAGES),
        (10**6, 1, MAX_PAGES, MAX_PAGES),
    ],
)
def test_all_pages_up_to_a_bound(count: int, size: int, calls: int, read: int) -> None:
    """What lies beyond is counted."""
    found, asked = listing(pages(count, size))
    assert asked == list(range(1, calls + 1))
    assert (len(found.conflicts), found.unread, found.failure) == (read, count - read, None)


def test_a_server_that_sends_one_page_for_ever() -> None:
    """It is not believed to have sent all."""
    found, asked = listing(pages(250, 100, honoured=False))
    assert (asked, found.unread) == ([1, 2, 3], 150)


@pytest.mark.parametrize("total", [1, 10**9])
def test_a_server_that_has_more_and_sends_none(total: int) -> None:
    """There is no size to reckon with, so it is asked once."""
    found, asked = listing(lambda _: ConflictPage(conflicts=(), total=total))
    assert (asked, found.unread) == ([1], total)


def test_a_total_that_is_too_small() -> None:
    """More came than were promised."""
    found, _ = listing(lambda _: page_of(range(3), total=1))
    assert (len(found.conflicts), found.unread) == (3, 0)


def test_a_conflict_that_slips_from_one_page_to_another() -> None:
    """One of the first page is resolved, and all others move up by one: the one that nobody read is missed."""
    served = {1: page_of(range(100), 250), 2: page_of(range(101, 201), 249), 3: page_of(range(201, 250), 249)}
    assert listing(served.__getitem__)[0].unread == 1


@pytest.mark.parametrize("failing", [1, 3])
def test_a_page_that_fails(failing: int) -> None:
    """What the others say counts all the same; how many are missing is not known."""

    def server(number: int) -> ConflictPage | Condition:
        return "server_error" if number == failing else pages(250)(number)

    found, _ = listing(server)
    assert (len(found.conflicts), found.unread, found.failure) == (0 if failing == 1 else 200, None, "server_error")


# --- Asked of a MetaQore ----------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [True, False])
def test_a_critical_conflict_that_blocks_no_artifact(ask: Ask, stand_in: StandIn, paged: bool) -> None:
    """The report does not have it; the project is vetoed, on whatever page it stands."""
    stand_in.pages = paged
    stand_in.conflicts[P1] = [*(conflict(number, "low") for number in range(1, 250)), conflict(250, "critical")]
    found = standing(ask())
    assert found.context["conditions"] == ["critical_conflict"]
    assert found.veto is not None
    assert not found.retryable
    shown = found.context["unresolved_conflicts"]
    assert (shown["count"], shown["critical"], shown["unread"]) == (250, 1, 0)
    assert shown["listed"][0]["id"] == "conf_0000000000fa"
    assert found.context["blocked_artifacts"] == {"count": 0, "listed": []}
    assert len(stand_in.calls) == (6 if paged else 4)


@pytest.mark.parametrize("paged", [True, False])
def test_resolved_ones_do_not_count_whatever_is_sent(ask: Ask, stand_in: StandIn, paged: bool) -> None:
    """Even by a server that ignores what it is asked for."""
    stand_in.pages = paged
    stand_in.conflicts[P1] = [conflict(1, "critical", resolved=True), conflict(2, "high")]
    found = standing(ask()).context
    assert found["outcome"] == "passed"
    assert (found["unresolved_conflicts"]["count"], found["unresolved_conflicts"]["critical"]) == (1, 0)


def test_one_that_both_tell_counts_once_and_at_its_worst(ask: Ask, stand_in: StandIn) -> None:
    """They are read at about the same time, but not at the same."""
    stand_in.add(1, "planning", artifact(1, P1, conflicts=(conflict(1, "low"), conflict(2, "low"))))
    stand_in.conflicts[P1] = [conflict(1, "critical"), conflict(2, "low", resolved=True), conflict(3, "medium")]
    shown = standing(ask()).context["unresolved_conflicts"]
    assert (shown["count"], shown["critical"]) == (3, 1)
    assert [one["severity"] for one in shown["listed"]] == ["critical", "medium", "low"]


@pytest.mark.parametrize("mode", ["strict", "adaptive", "playground"])
def test_more_than_are_read(ask: Ask, stand_in: StandIn, mode: str) -> None:
    """Nobody knows whether one of the others is critical, so in strict the request does not run now."""
    stand_in.mode, count = mode, PAGE_SIZE * MAX_PAGES + 3
    stand_in.conflicts[P1] = [conflict(number, "low") for number in range(1, count + 1)]
    found = standing(ask(timeout_s=10.0, breaker_failures=1))
    assert found.context["conditions"] == ["conflicts_unread"]
    assert found.context["unresolved_conflicts"]["unread"] == 3
    assert (found.veto is not None, found.retryable) == (mode == "strict",) * 2
    assert len(stand_in.calls) == MAX_PAGES + 3


@pytest.mark.parametrize("how", sorted(set(FAILURES) - {"hang", "drip", "drip_headers"}))
def test_a_list_that_fails_alone(ask: Ask, stand_in: StandIn, how: str) -> None:
    """The report is no list of all conflicts, so that they are not known; what it has counts."""
    stand_in.add(1, "planning", artifact(1, P1, conflicts=(conflict(1, "high"),)))
    stand_in.fail(how, "conflicts")
    found = standing(ask(max_answer_bytes=2**20))
    assert found.context["conditions"] == [FAILURES[how]]
    assert found.retryable
    assert found.context["mode_source"] == "metaqore"
    shown: dict[str, Any] = found.context["unresolved_conflicts"]
    assert (shown["count"], shown["unread"]) == (1, None)


def test_pages_share_one_deadline(ask: Ask, stand_in: StandIn) -> None:
    """However many there are, they end when the time is over."""
    stand_in.conflicts[P1] = [conflict(number, "low") for number in range(1, 1000)]
    stand_in.slow_s = 0.3
    found = standing(ask(timeout_s=0.5))
    assert found.context["conditions"] == ["timeout"]
    assert found.context["unresolved_conflicts"]["count"] == PAGE_SIZE
