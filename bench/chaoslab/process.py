"""One process of the site: started, killed as the kernel kills, and started again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gateway_app.local import processes
from tests.workers import ROOT

LAST_WORDS = 1_000


class Process:
    """A command that can be run again and again, its output appended to `log`.

    A Celery worker's `name` is its node name, under which the record has it. `answers` looks whether it does its work yet; it is given what the process wrote since its last start.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        answers: Callable[[bytes], bool],
    ) -> None:
        self.name = name
        self.failures = 0
        self.killed_at = 0.0
        self._command = command
        self._environment = environment
        self._log = log
        self._answers = answers
        self._process: subprocess.Popen[bytes] | None = None
        self._written_before = 0
        self._ready = False

    @property
    def pid(self) -> int | None:
        """Return the id of the process, or None while there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def ended(self) -> bool:
        """Tell whether it was started and runs no more, for whatever reason."""
        return self._process is not None and self._process.poll() is not None

    @property
    def ready(self) -> bool:
        """Tell whether it runs and has said that it works."""
        if self.pid is None:
            return False
        if not self._ready:
            self._ready = self._answers(self._said())
            if self._ready:
                self.failures = 0
        return self._ready

    @property
    def last_words(self) -> str:
        """Return the end of what it wrote since its last start."""
        return self._said()[-LAST_WORDS:].decode("utf-8", "replace")

    def start(self) -> None:
        """Start it. It is called from the main thread: the process ends when that does."""
        self._written_before = self._log.stat().st_size if self._log.exists() else 0
        self._ready = False
        self.failures += 1
        with self._log.open("ab") as log:
            self._process = processes.start(self._command, folder=ROOT, environment=self._environment, log=log)

    def kill(self) -> None:
        """Kill it and all its children with SIGKILL."""
        self.killed_at = time.time()
        if self._process is not None:
            processes.kill(self._process)

    def _said(self) -> bytes:
        with self._log.open("rb") as log:
            log.seek(self._written_before)
            return log.read()
