"""Housekeepers as an operator starts them: processes of their own, that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.workers import ROOT

STOP_S = 30.0


class HousekeeperProcess:
    """One `celery -A gateway_app.housekeeping worker -Q housekeeping`, on the configuration of the calling test."""

    def __init__(self, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "celery", "-A", "gateway_app.housekeeping", "worker", "-Q", "housekeeping"]
        options = ["--loglevel", "INFO", "--without-mingle", "--without-gossip", "-n", f"{log.stem}@test"]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *options], cwd=ROOT, stdout=output, stderr=output, env=dict(os.environ)
            )

    def kill(self) -> None:
        """Kill it as the kernel would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end, and wait until it has."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(STOP_S)
