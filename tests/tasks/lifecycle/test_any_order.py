"""However workers die, wake up late and repeat themselves, a request has one end, and row and record agree on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy.engine import Engine

from tests.tasks.lifecycle.machine import Lifecycle

#: How many runs of how many steps each database gets; PostgreSQL's are the same in every run.
EXAMPLES = {"sqlite": 30, "postgresql": 10}
STEPS = 30


@pytest.fixture
def machine(engine: Engine) -> Iterator[type[Lifecycle]]:
    """Return the state machine, on a database."""
    if engine.dialect.name == "sqlite":
        # No power failure is part of this, and waiting for the disk would be most of the time.
        sa.event.listen(engine, "connect", lambda driver, _record: driver.execute("PRAGMA synchronous=OFF"))
    Lifecycle.engine = engine
    yield Lifecycle
    del Lifecycle.engine


def run(machine: type[Lifecycle], examples: int, *, fixed: bool, phases: tuple[Phase, ...]) -> None:
    """Drive the machine through random runs."""
    chosen = settings(
        max_examples=examples, stateful_step_count=STEPS, deadline=None, database=None, derandomize=fixed,
        phases=phases, print_blob=True, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=chosen)


def test_anything_in_any_order(machine: type[Lifecycle]) -> None:
    """At most one terminal event; the row is as the model; epoch and attempt grow; who is fenced off changes nothing."""
    kind = machine.engine.dialect.name
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    run(machine, EXAMPLES[kind], fixed=kind == "postgresql", phases=phases)


#: What is left out of the code, and how: each of these would lose or double a request sooner or later.
HOLES = {
    "an_attempt_that_was_given_up_gives_back": ("tasks.lifecycle.giving_back.carries", lambda _row, _attempt: True),
    "what_has_ended_is_given_back": ("tasks.lifecycle.giving_back.TERMINAL_STATES", ()),
}


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
@pytest.mark.parametrize("hole", HOLES)
def test_holes_are_found(machine: type[Lifecycle], hole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test above: with one of the checks left out, it fails."""
    monkeypatch.setattr(*HOLES[hole])
    with pytest.raises((AssertionError, sa.exc.IntegrityError, BaseExceptionGroup)):
        run(machine, 60, fixed=True, phases=(Phase.generate,))
