"""What the tests of upgrades share: the code of the release before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.upgrade import previous_release


@pytest.fixture(scope="session")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the release before."""
    return previous_release.unpack(tmp_path_factory.mktemp("release"))
