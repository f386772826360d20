"""A follower that is killed with SIGKILL at any moment, while events are written: `killing` does the same for longer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.gateway_app.audit.killing import soak

KILLS = 6


@pytest.fixture
def seed() -> int:
    """Return another number each time; a test that fails shows it."""
    chosen = random.randrange(10**6)
    print("seed", chosen)
    return chosen


def test_each_event_is_there_once(migrated_url: str, tmp_path: Path, seed: int) -> None:
    """And so is all that MetaQore wrote to the same file meanwhile."""
    folder = tmp_path / "metaqore"
    folder.mkdir()
    outcome = soak(migrated_url, folder, KILLS, seed)
    assert outcome.exact, outcome
    assert outcome.events > KILLS


@pytest.mark.parametrize(("way", "harm"), [("note nothing", "repeated"), ("note first", "missing")])
def test_naive_followers_are_found_out(sqlite_template: Path, tmp_path: Path, seed: int, way: str, harm: str) -> None:
    """A test of the test above: what such a follower loses or writes twice is seen."""
    for attempt in range(6):
        folder = tmp_path / f"metaqore{attempt}"
        folder.mkdir()
        path = folder / "gateway.db"
        path.write_bytes(sqlite_template.read_bytes())
        if getattr(soak(f"sqlite:///{path}", folder, KILLS, seed + attempt, way), harm):
            return
    pytest.fail(f"killing a follower {6 * KILLS} times has shown no harm")
