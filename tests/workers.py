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
    """One `celery worker -Q gpu`, on the configuration of the calling test and the `variables` of its own."""

    def __init__(self, log: Path, name: str = "gpu@test", **variables: str) -> None:
        self.log = log
        self.name = name
        self.variables = variables
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is ready when `/readyz` says so."""
        command = [sys.executable, "-m", "celery", "worker", "-Q", "gpu", "--loglevel", "INFO", "-n", self.name]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=log, env=dict(os.environ) | self.variables
            )

    def kill(self) -> None:
        """Kill it as the kernel would: nothing of it gets to clean up."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and wait until it and all its children have."""
        self._end(signal.SIGTERM)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Wait until it has ended; return its exit status."""
        assert self.process is not None
        status = self.process.wait(timeout_s)
        self.process = None
        return status

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.send(number)
        self.wait()
        _, alive = psutil.wait_procs(family, STOP_S)
        assert not alive, f"the worker left {alive}"
