"""An installation of which every process runs one release or the other, each started and stopped as an operator does."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import redis
import requests

from bench.chaoslab.lab import environment
from gateway_app.local import processes
from tasks.settings import PREFIX
from tests.services import free_port, wait_until
from tests.workers import ROOT

Role = Literal["gateway", "housekeeper", "worker"]
SOON_S = 90.0
#: So long a gateway finishes what it answers; its streams are cut off then.
GRACE_S = 1


@dataclass
class Running:
    """One process of a release; `url` is a gateway's, `node` a worker's name."""

    role: Role
    process: subprocess.Popen[bytes]
    url: str = ""
    node: str = ""

    def stop(self) -> None:
        """Ask it to end, and wait until it has. It must not have ended before."""
        assert self.process.poll() is None, f"a {self.role} ended by itself with {self.process.returncode}"
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(SOON_S)
        assert status == 0, f"a {self.role} ended with {status}"


@dataclass
class MixedFleet:
    """One gateway, one housekeeper and one worker; while one is replaced, there are two of its kind.

    `given` is the configuration, in environment variables; `urls` are the gateways that clients know, which is changed in
    place. Releases are told apart by their folders.
    """

    folder: Path
    given: Mapping[str, str]
    urls: list[str] = field(default_factory=list)
    running: dict[Role, Running] = field(default_factory=dict)
    started: list[Running] = field(default_factory=list)

    def replace(self, role: Role, release: Path) -> None:
        """Start a process of `release`, wait until it works, and stop the one that it replaces, if there is one."""
        new = self.start(role, release)
        self.wait_for(new)
        self.switch_to(new)

    def start(self, role: Role, release: Path) -> Running:
        """Start a process of `release`, beside what runs."""
        name = f"{role}-{len(self.started)}"
        given, url, node = {**environment(), **self.given}, "", f"{name}@test"
        # `-m` puts the working directory before everything else, so the release there is what is imported.
        if role == "gateway":
            port = free_port()
            url, given[f"{PREFIX}GATEWAY__PORT"] = f"http://127.0.0.1:{port}", str(port)
            options = ["--graceful-timeout", str(GRACE_S)]
            command = ["gunicorn", "-c", "python:gateway_app.gunicorn", *options, "gateway_app:create_app()"]
        elif role == "worker":
            command = ["celery", "-A", "worker_gpu", "worker", "-Q", "gpu", *options_of(node)]
        else:
            command = ["celery", "-A", "gateway_app.housekeeping", "worker", "-Q", "housekeeping", *options_of(node)]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = processes.start([sys.executable, "-m", *command], folder=release, environment=given, log=log)
        made = Running(role, process, url, node)
        self.started.append(made)
        return made

    def wait_for(self, *some: Running) -> None:
        """Wait until these work."""
        with redis.Redis.from_url(self.given["REDIS_URL"]) as client:
            for one in some:
                works = functools.partial(self._works, one, client)
                wait_until(works, SOON_S, f"a {one.role}; logs are in {self.folder}")

    def switch_to(self, new: Running) -> None:
        """Let a process take its predecessor's place, and stop that."""
        old = self.running.get(new.role)
        self.running[new.role] = new
        if new.url:
            self.urls[:] = [new.url]
        if old is not None:
            old.stop()

    def flask(self, release: Path, *words: str) -> str:
        """Run a `flask` command of a release; return what it wrote."""
        return self._run(release, "-m", "flask", *words)

    def python(self, release: Path, code: str, *words: str) -> str:
        """Run some code of a release; return what it wrote."""
        return self._run(release, "-c", code, *words)

    def _run(self, release: Path, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=release, env={**environment(), **self.given}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill(self) -> None:
        """End everything at once."""
        for one in self.started:
            processes.kill(one.process)

    def _works(self, one: Running, client: redis.Redis) -> bool:
        assert one.process.poll() is None, f"a {one.role} ended with {one.process.returncode}; see {self.folder}"
        if one.role == "worker":
            beat: Any = client.get(f"metaqore:worker:{one.node}")
            return beat is not None and json.loads(beat)["state"] == "ready"
        if one.role == "housekeeper":
            # Only one leads, so a second one says nothing in Redis; Celery's own line is the last of its start.
            return b" ready." in (self.folder / f"{one.node.partition('@')[0]}.log").read_bytes()
        try:
            return requests.get(f"{one.url}/healthz", timeout=10).status_code == 200
        except requests.ConnectionError:
            return False


def options_of(node: str) -> list[str]:
    """Return a Celery worker's options: its name, and that it tells when it works."""
    return ["--loglevel", "INFO", "-n", node]


def configuration(folder: Path, model: Path, redis_url: str, database_url: str, **settings: str) -> dict[str, str]:
    """Return the environment that configures a fleet; `settings` are given without prefix, and known to both releases."""
    defaults = {
        "SECRETS__DIRECTORY": str(folder / "secrets"),
        "ENGINE__KIND": "simulated",
        "ENGINE__MODEL": str(model),
        "ENGINE__MAX_NUM_SEQS": "8",
        "GOVERNANCE__PROFILES_DIRECTORY": str(ROOT / "profiles"),
        "GATEWAY__HOST": "127.0.0.1",
        "SCHEDULING__LEASE_S": "4",
        "SCHEDULING__DRAIN_S": "1",
    }
    given = {f"{PREFIX}{name}": value for name, value in (defaults | settings).items()}
    (folder / "gateway.json").write_text("{}", "utf-8")
    return {
        **given,
        f"{PREFIX}CONFIG": str(folder / "gateway.json"),
        "REDIS_URL": redis_url,
        "DATABASE_URL": database_url,
    }
