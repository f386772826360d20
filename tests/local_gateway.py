"""A whole gateway as `bin/run` starts it, in a project folder of its own, to be watched and killed from outside."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil

from gateway_app.local.client import Client, Event
from gateway_app.local.folder import Folder
from tasks.settings import CONFIG_VARIABLE, PREFIX
from tests.services import free_port, processes_in, wait_until

ROOT = Path(__file__).parents[1]
READY_S = 30.0
END_S = 60.0
COMMAND = (sys.executable, "-m", "gateway_app.local")
READY = "The gateway is ready."


class LocalGateway:
    """`python -m gateway_app.local` in `root`. Its usual port is a free one, so that tests may run side by side."""

    def __init__(self, root: Path, model: Path) -> None:
        root.mkdir()
        self.root, self.folder = root, Folder(root)
        self.usual_port = free_port()
        (root / "gateway.json").write_text(json.dumps({"gateway": {"port": self.usual_port}}), "utf-8")
        self.output_file = root / "output"
        self.process: subprocess.Popen[bytes] | None = None
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith((PREFIX, "COVERAGE_", "REDIS_", "DATABASE_"))
        }
        self.environment = kept | {
            "PYTHONPATH": str(ROOT),
            f"{PREFIX}ENGINE__KIND": "simulated",
            f"{PREFIX}ENGINE__MODEL": str(model),
            f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY": str(ROOT / "profiles"),
            f"{PREFIX}SCHEDULING__LEASE_S": "2",
        }
        assert CONFIG_VARIABLE not in self.environment

    @property
    def pid(self) -> int:
        """Return the supervisor's process id."""
        assert self.process is not None
        return self.process.pid

    @property
    def url(self) -> str:
        """Return where the gateway says it is."""
        return f"http://127.0.0.1:{(self.folder.run / 'gateway.port').read_text().strip()}"

    @property
    def output(self) -> str:
        """Return what it has printed since its last start, on both streams."""
        return self.output_file.read_text("utf-8")

    def start(self, *arguments: str, **variables: str) -> None:
        """Start it as the leader of a process group, as a shell does."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A test run in a shell's background ignores Ctrl-C, and so would what it starts.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.process is not None:
            self.process.wait(END_S)
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments],
                cwd=self.root,
                env=self.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )

    def start_another(self) -> subprocess.CompletedProcess[str]:
        """Start it a second time in the same folder; return how that ended."""
        return subprocess.run(
            COMMAND, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=END_S, check=False
        )

    def start_ready(self, **variables: str) -> Client:
        """Start it, wait until it says that it is ready, and return a client of it."""
        self.start(**variables)
        with suppress(TimeoutError):
            wait_until(lambda: READY in self.output or self._ended(), READY_S, "a gateway that is ready")
        assert READY in self.output, self.everything_said()
        return self.client()

    def everything_said(self) -> str:
        """Return what it has printed, and the end of every log."""
        logs = sorted(self.folder.path.glob("log/*.log"))
        return "\n".join([self.output, *(f"{log.name}:\n{log.read_text('utf-8')[-3000:]}" for log in logs)])

    def client(self) -> Client:
        """Return a client of the gateway that runs."""
        return Client(self.url, self.folder.api_key.read_text().strip(), timeout_s=30.0)

    def ends(self, timeout_s: float = END_S) -> int:
        """Wait for its end; return the exit status once nothing of it is left."""
        assert self.process is not None
        status = self.process.wait(timeout_s)
        assert self.family() == [], "processes are left"
        return status

    def family(self) -> list[psutil.Process]:
        """Return every process that works in the project's folder, whoever its parent is by now."""
        return processes_in(self.root)

    def child(self, name: str) -> psutil.Process | None:
        """Return a service's process by its pid file, or None while there is none."""
        try:
            process = psutil.Process(int((self.folder.run / f"{name}.pid").read_text()))
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None

    def kinds(self) -> dict[str, Counter[str]]:
        """Return how many audit events of each kind each request has."""
        found: dict[str, Counter[str]] = {}
        with closing(sqlite3.connect(self.folder.path / "gateway.db", timeout=10)) as database:
            for request_id, kind in database.execute("SELECT request_id, kind FROM audit_events"):
                found.setdefault(request_id, Counter())[kind] += 1
        return found

    def kill_everything(self) -> None:
        """End what a failed test has left."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()

    def _ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None


def poll(client: Client, task: dict[str, Any]) -> dict[str, Any]:
    """Return a task as `GET /v1/tasks/ID` tells it."""
    return client._json("GET", task["links"]["self"], expected=200)


def text_of(frames: list[Event]) -> str:
    """Return the text of the last attempt, as a client that obeys `reset` has it."""
    text = ""
    for frame in frames:
        text = "" if frame.name == "reset" else text + frame.data.get("text", "")
    return text
