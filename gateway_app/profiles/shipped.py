"""What is asked of the files besides their format, which tasks/prompts/profile.py reads."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from tasks.errors import ProfileError
from tasks.prompts.profile import Profile

#: So that organizations' own versions, which count up from the file's, still fit the tables' numbers.
MAX_SHIPPED_VERSION = 2_000_000_000


def last_changed(directory: Path) -> datetime:
    """Return when the newest profile in `directory` was written: the same in all processes that read these files."""
    times = [path.stat().st_mtime for path in directory.glob("*.yaml")]
    return datetime.fromtimestamp(max(times, default=0), UTC)


def check_versions(agents: Mapping[str, Profile]) -> None:
    """Raise ProfileError if a file's version is too large a number."""
    for agent, profile in agents.items():
        if profile.version > MAX_SHIPPED_VERSION:
            raise ProfileError(f"{agent}: version must be at most {MAX_SHIPPED_VERSION}")
