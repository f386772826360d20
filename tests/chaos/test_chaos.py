"""Every scenario of `bin/bench chaos`, much shortened: real processes are killed, and nothing may be lost.

`CHAOS_SEED=7 pytest tests/chaos` does the same harm again that a run with that seed has done.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from bench.chaoslab import SCENARIOS
from bench.chaoslab.lab import Lab
from bench.chaoslab.stock import lose

#: Of counts and durations, so that each scenario takes about ten seconds here.
SCALES = {
    "workers": 0.015,
    "gateways": 0.02,
    "redis": 0.02,
    "database": 0.05,
    "poison": 0.08,
    "overload": 0.03,
    "stalled": 0.1,
    "long": 0.05,
}
#: What a shared machine may be slower by than the one that targets in seconds are for.
PATIENCE = 4.0


def test_every_scenario_is_run_here() -> None:
    """A scenario that is added is added here too; the control has a test of its own below."""
    assert {*SCALES, "stock"} == {*SCENARIOS}


@pytest.mark.parametrize("name", SCALES)
def test_nothing_is_lost(name: str, tmp_path: Path, tiny_model: Path) -> None:
    """What the scenario's module promises holds, whatever the seed."""
    lab = Lab(tmp_path, tiny_model, seed(), SCALES[name])
    outcome = SCENARIOS[name](lab)
    print({figure: round(value, 3) for figure, value in outcome.figures.items()})
    assert not outcome.missed(PATIENCE), [*outcome.missed(PATIENCE), *outcome.examples]


def test_the_stock_transport_loses(tmp_path: Path, tiny_model: Path) -> None:
    """The control: under such kills Celery's own Redis transport loses a message before long."""
    losses = lose(Lab(tmp_path, tiny_model, seed()), kills=60, a_kill=100, enough=1)
    print(losses)
    assert losses.lost >= 1


def seed() -> int:
    """Return the seed to use, and print it."""
    chosen = int(os.environ.get("CHAOS_SEED") or random.randrange(2**31))
    print(f"CHAOS_SEED={chosen}")
    return chosen
