"""What tests of a follower begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway_app.audit import follow
from tasks.db import Database
from tests.gateway_app.audit.recording import fill, opened


@pytest.fixture
def database(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """Return a record of nine events of two organizations."""
    path = tmp_path / "gateway.db"
    path.write_bytes(sqlite_template.read_bytes())
    with opened(f"sqlite:///{path}") as made:
        fill(made, 9, "acme", "acme", "other")
        yield made


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nine events be more than one batch."""
    monkeypatch.setattr(follow, "BATCH", 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return MetaQore's folder."""
    made = tmp_path / "metaqore"
    made.mkdir()
    return made
