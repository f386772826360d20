"""The table of states: complete, true to the code and the page, and able to tell a record that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import lifecycle, queueing
from tasks.schema import REQUEST_KINDS, STATES, TERMINAL_KINDS, TERMINAL_STATES
from tasks.states import NOTHING, STEPS, reached
from tests.tasks.drawn import PAGE, drawing, table, with_states

SCRIPTS = Path(next(iter(queueing.__path__)))


def test_the_states_are_those_of_sql_and_three_more() -> None:
    """Where a request is received, admitted or leased, SQL says something else, or nothing yet."""
    states = {step.target for step in STEPS} | {source for step in STEPS for source in step.sources}
    assert states == {*STATES, NOTHING, "received", "admitted", "leased"}


def test_nothing_leads_out_of_an_end() -> None:
    """And out of everything else something does, to an end at last."""
    leads = {source for step in STEPS for source in step.sources}
    assert leads.isdisjoint(TERMINAL_STATES)
    assert {step.target for step in STEPS} <= leads | set(TERMINAL_STATES)


def test_every_event_is_left_by_some_step() -> None:
    """Terminal ones by the steps to an end, and by no others."""
    assert {kind for step in STEPS for kind in step.kinds} == set(REQUEST_KINDS)
    for step in STEPS:
        assert (step.target in TERMINAL_STATES) == any(kind in TERMINAL_KINDS for kind in step.kinds)
        assert step.target not in TERMINAL_STATES or set(step.kinds) <= {step.target, "vetoed"}


def test_every_step_is_code() -> None:
    """A function of the lifecycle, or a script in Redis. And every function that changes a request is a step."""
    named = {step.by for step in STEPS}
    functions = {name for name in named if not name.endswith(".lua")}
    assert functions == {name for name in lifecycle.__all__ if name.islower()}
    for script in named - functions:
        assert (SCRIPTS / script).is_file(), script


def test_the_page_shows_these_states() -> None:
    """Run `drawn` as a module to write them again."""
    page = PAGE.read_text("utf-8")
    assert drawing() in page
    assert table() in page
    assert with_states(page) == page


@pytest.mark.parametrize(
    ("kinds", "states"),
    [
        ("", {NOTHING}),
        ("received", {"received"}),
        ("received vetoed", {"failed"}),
        ("received failed", {"failed"}),
        ("received admitted", {"admitted", "queued", "leased"}),
        ("received admitted started", {"running"}),
        ("received admitted started started completed", {"completed"}),
        ("received admitted started requeued", {"queued", "leased"}),
        ("received admitted requeued requeued started requeued cancelled", {"cancelled"}),
        ("received admitted dead", {"dead"}),
        ("received admitted vetoed", {"failed"}),
    ],
)
def test_what_a_record_says(kinds: str, states: set[str]) -> None:
    """Where a request is by its events."""
    assert reached(kinds.split()) == states


@pytest.mark.parametrize(
    "kinds",
    [
        "admitted",
        "started",
        "received started",
        "received admitted completed",
        "received cancelled",
        "received admitted requeued completed",
        "received admitted started completed completed",
        "received admitted started dead started",
        "received vetoed admitted",
        "received received",
        "received admitted nonsense",
    ],
)
def test_what_no_record_can_say(kinds: str) -> None:
    """No states: this cannot have come about."""
    assert reached(kinds.split()) == frozenset()
