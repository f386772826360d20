"""What the tests of `bin/run`'s parts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_app.local.folder import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Return a project's folder with an empty `var/`."""
    folder = Folder(tmp_path)
    folder.make()
    return folder
