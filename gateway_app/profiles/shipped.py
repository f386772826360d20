"""What is asked of the files besides their format, which tasks/prompts/profile.py reads."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from gateway_app.profiles.rows import Pin
from gateway_app.profiles.sealing import Inherited
from tasks.errors import ProfileError
from tasks.prompts.profile import ORDER, Profile, in_order

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


def shipped_inheritance(agents: Mapping[str, Profile]) -> dict[str, Inherited]:
    """Return what each of the files inherits from the others; each is a base as it is shipped.

    Raises ProfileError, naming the file's agent.
    """
    done: dict[str, Inherited] = {}

    def resolve(name: str, above: tuple[str, ...]) -> Inherited:
        profile, base = agents[name], agents[name].extends
        if base is None or name in done:
            return done.setdefault(name, Inherited())
        if base not in agents:
            raise ProfileError(f"{name}: no file defines {base!r}, which it extends")
        if base in (name, *above):
            raise ProfileError(f"{name} would extend itself: {' extends '.join((*above, name, base))}")
        outer = resolve(base, (*above, name))
        done[name] = found = Inherited(
            outer.before(agents[base]).segments, (Pin(base, agents[base].version), *outer.pins)
        )
        if not in_order(found.before(profile).segments):
            raise ProfileError(
                f"{name}: with what {base!r} holds, the segments are not in the order {', '.join(ORDER)}"
            )
        return found

    for name in agents:
        resolve(name, ())
    return done
