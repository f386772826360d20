"""GPU workers as an operator starts them: processes of their own, from the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
STOP_S = 30.0


class Worker:
    """One `celery worker -Q gpu`, on the configuration of the calling test."""

    def __init__(self, log: Path, name: str = "gpu@test") -> None:
        self.log = log
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is ready when `/readyz` says so."""
        command = [sys.executable, "-m", "celery", "worker", "-Q", "gpu", "--loglevel", "INFO", "-n", self.name]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=dict(os.environ))

    def kill(self) -> None:
        """Kill it as the kernel would: nothing of it gets to clean up."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and wait until it and all its children have."""
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self.process is None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(number)
        self.process.wait(STOP_S)
        _, alive = psutil.wait_procs(family, STOP_S)
        self.process = None
        assert not alive, f"the worker left {alive}"
