"""A whole gateway of real processes, all of which tell as much as they can, and every place that what they tell goes to."""

from __future__ import annotations

import codecs
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests

from tests.collector import Collector, collecting
from tests.conftest import new_key
from tests.fleet import READY_S, Gateway, own_services
from tests.services import free_port, wait_until
from tests.workers import ROOT

SOON_S = 60.0
#: Sampling seeds of requests at which the engine fails, and at which its process is killed.
FAILS, KILLS = 666, 667
FAULTS = f'{{"time_scale": 0.2, "faults": [{{"what": "fail", "seed": {FAILS}}}, {{"what": "kill", "seed": {KILLS}}}]}}'


class Process:
    """One process, which can be started again; its output goes to a file."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str], *command: str) -> None:
        self.log = folder / f"{name}.log"
        self._command, self._environment = [sys.executable, "-m", *command], environment
        self.start()

    def start(self) -> None:
        """Start it."""
        with self.log.open("ab") as output:
            self._began = output.tell()
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, stdout=output, stderr=output, env=self._environment, process_group=0
            )

    def said(self) -> bytes:
        """Return what it has written since it was started."""
        return self.log.read_bytes()[self._began :]

    def end(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal, if it runs, and wait until it has ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(SOON_S)

    def family(self) -> list[psutil.Process]:
        """Return it and its children."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]


class Monitor:
    """Every command that a Redis is sent, as its own monitor shows it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._connection = socket.create_connection((parts.hostname, parts.port), SOON_S)
        self._connection.sendall(b"MONITOR\r\n")
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def seen(self) -> bytes:
        """Return what was seen, with bytes that the monitor escapes as they are."""
        return codecs.escape_decode(bytes(self._seen))[0]

    def close(self) -> None:
        """Look no more."""
        self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._connection.close()

    def _read(self) -> None:
        while data := self._connection.recv(2**16):
            self._seen += data


class Whole:
    """The processes: `gateway`, `worker`, `housekeeper` and `flower`; and where what they tell can be read."""

    def __init__(self, folder: Path, environment: dict[str, str], collector: Collector, stack: ExitStack) -> None:
        self.folder, self.collector = folder, collector
        self.database = folder / "gateway.db"
        self.key = new_key("default", "admin")
        self.redis_url = environment["REDIS_URL"]
        self.monitor = Monitor(self.redis_url)
        stack.callback(self.monitor.close)
        self._ports = {name: free_port() for name in ("worker", "housekeeper", "flower")}
        self._password = secrets.token_urlsafe()
        everything = (
            os.environ
            | environment
            | collector.environment
            | {
                "METAQORE_METRICS__WORKER_PORT": str(self._ports["worker"]),
                "METAQORE_METRICS__HOUSEKEEPER_PORT": str(self._ports["housekeeper"]),
                "FLOWER_BASIC_AUTH": f"flower:{self._password}",
            }
        )
        self.gateway = Gateway(folder / "gateway.log", everything, "--log-level", "debug")
        stack.callback(self.gateway.kill)
        debug = ("--loglevel", "DEBUG")
        celery = {
            "worker": ("celery", "-A", "worker_gpu", "worker", "-Q", "gpu", "-n", "gpu@test", "-E", *debug),
            "housekeeper": ("celery", "-A", "gateway_app.housekeeping", "worker", "-Q", "housekeeping", *debug),
            "flower": ("celery", "-A", "worker_gpu", "flower", f"--port={self._ports['flower']}", "--logging=debug"),
        }
        made = {name: Process(name, folder, everything, *command) for name, command in celery.items()}
        self.worker, self.housekeeper, self.flower = made["worker"], made["housekeeper"], made["flower"]
        for process in made.values():
            stack.callback(process.end)
        wait_until(self.gateway.ready, READY_S, "a gateway and a worker")
        wait_until(
            lambda: self._flower_shows("/api/workers?refresh=1", b"gpu@test"), SOON_S, "Flower to see the worker"
        )

    @property
    def headers(self) -> dict[str, str]:
        """Return what authenticates a request."""
        return {"Authorization": f"Bearer {self.key}"}

    def told(self) -> dict[str, bytes]:
        """Return all that can be read of the processes by now, by the place where it is read."""
        log = {f"{name}'s output": (self.folder / f"{name}.log").read_bytes() for name in (*self._ports, "gateway")}
        metrics = {
            "gateway's metrics": self._get(f"{self.gateway.url}/metrics"),
            "worker's metrics": self._get(f"http://127.0.0.1:{self._ports['worker']}/metrics"),
            "housekeeper's metrics": self._get(f"http://127.0.0.1:{self._ports['housekeeper']}/metrics"),
            "Flower's metrics": self.flower_page("/metrics"),
        }
        pages = ("/api/tasks", "/api/workers?refresh=1", "/workers", "/broker", "/tasks", "/api/queues/length")
        flower = {f"Flower's {path}": self.flower_page(path) for path in pages}
        return {**log, **metrics, **flower, "spans": b"".join(self.collector.bodies), "Redis": self.monitor.seen()}

    def flower_page(self, path: str) -> bytes:
        """Return a page of Flower's."""
        url = f"http://127.0.0.1:{self._ports['flower']}{path}"
        return requests.get(url, auth=("flower", self._password), timeout=SOON_S).content

    def wait_for_event(self, request_id: str, state: str) -> None:
        """Return once Flower shows a request in a state."""
        path, shown = f"/api/task/info/{request_id}", f'"state": "{state}"'.encode()
        wait_until(lambda: self._flower_shows(path, shown), SOON_S, f"Flower to show {state}")

    def restart_worker(self) -> None:
        """Start the worker again, and wait until it takes requests."""
        self.worker.start()
        # Its last heartbeat may not have ended yet.
        wait_until(lambda: b"gpu@test ready." in self.worker.said(), READY_S, "a worker")
        wait_until(self.gateway.ready, READY_S, "a gateway")

    def _flower_shows(self, path: str, wanted: bytes) -> bool:
        try:
            return wanted in self.flower_page(path)
        except requests.ConnectionError:
            return False

    @staticmethod
    def _get(url: str) -> bytes:
        return requests.get(url, timeout=SOON_S).content


@contextmanager
def whole(folder: Path, model: Path) -> Iterator[Whole]:
    """Return a whole gateway on services of its own, whose every attempt is the last one."""
    variables = {
        "ENGINE__OPTIONS": FAULTS,
        "LOGS__LEVEL": "debug",
        "FLOWER__EVENTS": "true",
        "SCHEDULING__LEASE_S": "2",
        "SCHEDULING__MAX_ATTEMPTS": "1",
        "DATABASE__TIMEOUT_S": "1",
    }
    with own_services(folder, model, **variables) as environment, collecting() as collector, ExitStack() as stack:
        yield Whole(folder, environment, collector, stack)
