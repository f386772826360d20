"""Runs all examinations side by side: one that hangs or fails takes nothing from the others.

Each has a thread of its own. Their services' time-outs end them within seconds; what hangs all the same, as a file on a dead
network file system does, is left behind in a thread that ends with the process, and told as unknown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from gateway_app.doctor import (
    clocks,
    database,
    host,
    metaqore,
    model,
    processes,
    redis_server,
    secrets,
    sqlite_file,
    tiers,
)
from gateway_app.doctor.finding import Examine, Finding, ok, unknown
from tasks.errors import ConfigurationError
from tasks.settings import Settings

#: All of it, in seconds.
DEADLINE_S = 20.0
EXAMINATIONS: Mapping[str, Examine] = {
    "host": host.examine,
    "secrets": secrets.examine,
    "database": database.examine,
    "sqlite": sqlite_file.examine,
    "redis": redis_server.examine,
    "clocks": clocks.examine,
    "processes": processes.examine,
    "model": model.examine,
    "tiers": tiers.examine,
    "metaqore": metaqore.examine,
}


def examine(settings: Settings | ConfigurationError, deadline_s: float = DEADLINE_S) -> list[Finding]:
    """Return everything that was found, in a fixed order. Without settings, only what needs none is looked at."""
    if isinstance(settings, ConfigurationError):
        broken = Finding("configuration", "fail", settings.detail, "correct the setting named above")
        names = ", ".join(EXAMINATIONS)
        return [broken, *host.examine_runtime(), unknown("everything else", f"{names} need the configuration")]
    examined = [_Examined(name, look, settings) for name, look in EXAMINATIONS.items()]
    until = time.monotonic() + deadline_s
    for one in examined:
        one.join(max(0.0, until - time.monotonic()))
    return [ok("configuration", "it can be read"), *(finding for one in examined for finding in one.result(deadline_s))]


class _Examined(threading.Thread):
    """One examination, under way from its making on."""

    def __init__(self, name: str, look: Examine, settings: Settings) -> None:
        super().__init__(name=name, daemon=True)
        self._look, self._settings = look, settings
        self._found: list[Finding] = []
        self.start()

    def run(self) -> None:
        """Collect what it finds."""
        try:
            self._found.extend(self._look(self._settings))
        except Exception as error:  # whatever a broken installation makes it raise; the rest must still be told
            # The text of an error may hold what must not be shown, such as a URL with its password.
            self._found.append(unknown(self.name, f"looking at it failed with {type(error).__name__}"))

    def result(self, deadline_s: float) -> list[Finding]:
        """Return what was found by now."""
        found = list(self._found)
        late = unknown(self.name, f"looking at it took longer than {deadline_s:.0f} s")
        return [*found, late] if self.is_alive() else found
