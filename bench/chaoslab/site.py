"""A whole installation on one machine, under a supervisor that starts again at once whatever ends.

Everything is a process of its own, started as an operator starts it. The supervisor is no thread: it works whenever a
scenario waits (`wait`, `until`), so that harm and help come from one thread and in one order. Processes begin again under
the same name and on the same port.
"""

from __future__ import annotations

import json
import random
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self, TypeVar

import requests

from bench.chaoslab.clients import Crowd
from bench.chaoslab.lab import environment
from bench.chaoslab.process import Process
from bench.chaoslab.services import DurableRedis, Fsync
from gateway_app.governance.api_keys import ApiKeys
from tasks.db import Database
from tasks.migrating import upgrade
from tasks.settings import CONFIG_VARIABLE, KEY_BYTES, PREFIX, SECRET_NAMES, DatabaseGroup
from tests.services import PostgresServer, free_port
from tests.workers import ROOT

T = TypeVar("T")
START_S = 120.0
TEND_S = 0.02
#: Longer than anything takes: leases, retries, and clients that wait for a stream that has gone silent.
STANDSTILL_S = 180.0
#: So often in a row a process may end before it works, of itself or killed.
MOST_FAILURES = 10
PROGRESS_S = 5.0
HOUSEKEEPER = "gateway_app.housekeeping"
#: What Celery says when it has begun to consume, after the node's name.
READY = b"@chaos ready"
#: A question's `max_tokens` alone says how long its answer is.
ENDLESS_TOKENS = 100_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What stands at a site. `engine` are options of the simulated engine, `settings` the gateway's, without prefix.

    `worker_app` is what Celery is told of the workers' application, and `variables` are further ones of each worker's
    environment, a worker after the other. Starting takes `start_s` at most.
    """

    gateways: int = 1
    workers: int = 1
    housekeepers: int = 1
    database: Literal["sqlite", "postgresql"] = "sqlite"
    fsync: Fsync = "everysec"
    lease_s: float = 2.0
    slots: int = 16
    engine: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    worker_app: Sequence[str] = ()
    variables: Sequence[Mapping[str, str]] = ()
    start_s: float = START_S


class Site:
    """The installation; a context manager. `progress` is asked every few seconds what to tell a person who waits."""

    def __init__(self, folder: Path, model: Path, plan: Plan, say: Callable[[str], None] = print) -> None:
        self.plan = plan
        self.folder = folder
        self.progress: Callable[[], str] | None = None
        self.redis = DurableRedis(plan.fsync)
        self.postgres = PostgresServer() if plan.database == "postgresql" else None
        self.gateways: list[Process] = []
        self.workers: list[Process] = []
        self.housekeepers: list[Process] = []
        self.urls: list[str] = []
        self.database_url = f"sqlite:///{folder / 'gateway.db'}"
        self.key = ""
        self._model = model
        self._say = say
        self._told_at = time.monotonic()
        self._stack = ExitStack()

    @property
    def processes(self) -> list[Process]:
        """Return everything that is supervised."""
        return [*self.gateways, *self.workers, *self.housekeepers]

    def __enter__(self) -> Self:
        try:
            self._stand_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stack.close()

    def tend(self) -> None:
        """Start again what has ended, and tell how things are now and then."""
        for process in self.processes:
            if process.ended:
                if process.failures > MOST_FAILURES:
                    raise RuntimeError(f"{process.name} does not start: {process.last_words}")
                process.start()
        if self.progress is not None and time.monotonic() > self._told_at + PROGRESS_S:
            self._told_at = time.monotonic()
            self._say(f"  {self.progress()}")

    def wait(self, seconds: float) -> None:
        """Let the site run for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.tend()
            time.sleep(min(TEND_S, left))

    def until(self, predicate: Callable[[], T | None], timeout_s: float, what: str) -> T:
        """Let the site run until `predicate` is true; return its value. Raises TimeoutError, which says `what`."""
        deadline = time.monotonic() + timeout_s
        while not (value := predicate()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:g} s for {what}; logs are in {self.folder}")
            self.wait(TEND_S)
        return value

    def see_out(self, crowd: Crowd) -> None:
        """Let the site run until everything that the crowd asks has ended, or nothing has for a long time.

        What has not ended by then is left to the judges, who say which it is.
        """
        finished, since = crowd.finished, time.monotonic()
        while not crowd.done and time.monotonic() < since + STANDSTILL_S:
            self.wait(TEND_S)
            if crowd.finished > finished:
                finished, since = crowd.finished, time.monotonic()

    def kill_one(self, of: list[Process], rng: random.Random) -> Process:
        """Kill one of these processes that works, at random, once there is one. It is started again at once."""
        ready = self.until(lambda: [process for process in of if process.ready], START_S, "a process to kill")
        victim = rng.choice(ready)
        victim.kill()
        self.tend()
        return victim

    def _stand_up(self) -> None:
        directory = self.folder / "secrets"
        directory.mkdir(mode=0o700)
        for name in SECRET_NAMES:
            (directory / name).write_text(secrets.token_hex(KEY_BYTES), encoding="ascii")
        (self.folder / "gateway.json").write_text('{"gateway": {"host": "127.0.0.1"}}', encoding="utf-8")
        self._stack.callback(self.redis.close)
        self.redis.start()
        if self.postgres is not None:
            self._stack.callback(self.postgres.close)
            self.postgres.start()
            self.database_url = self.postgres.url(self.postgres.create_database())
        upgrade(self.database_url)
        self.key = self._make_key(bytes.fromhex((directory / "key_pepper").read_text("ascii")))
        self._stack.callback(self._end_all)
        given = self._environment(directory)
        own = [*self.plan.variables, *({} for _ in range(self.plan.workers))]
        for number in range(1, self.plan.workers + 1):
            self.workers.append(
                self._celery(f"worker-{number}", "gpu", self.plan.worker_app, {**given, **own[number - 1]})
            )
        for number in range(1, self.plan.housekeepers + 1):
            self.housekeepers.append(self._celery(f"housekeeper-{number}", "housekeeping", ["-A", HOUSEKEEPER], given))
        for number in range(1, self.plan.gateways + 1):
            self.gateways.append(self._gateway(f"gateway-{number}", given))
        for process in self.processes:
            process.start()
        self.until(lambda: all(process.ready for process in self.processes), self.plan.start_s, "every process")
        self.until(self._takes_requests, self.plan.start_s, "a gateway that is ready")

    def _make_key(self, pepper: bytes) -> str:
        database = Database(DatabaseGroup(url=self.database_url))
        try:
            return ApiKeys(database, (pepper,)).create("default", "chaos")[1]
        finally:
            database.close()

    def _environment(self, directory: Path) -> dict[str, str]:
        engine = {"answer_tokens": ENDLESS_TOKENS, "max_model_len": 8192, **self.plan.engine}
        settings = {
            "SECRETS__DIRECTORY": str(directory),
            "ENGINE__KIND": "simulated",
            "ENGINE__MODEL": str(self._model),
            "ENGINE__OPTIONS": json.dumps(engine),
            "ENGINE__MAX_MODEL_LEN": str(engine["max_model_len"]),
            "ENGINE__MAX_NUM_SEQS": str(self.plan.slots),
            "GOVERNANCE__PROFILES_DIRECTORY": str(ROOT / "profiles"),
            "SCHEDULING__LEASE_S": str(self.plan.lease_s),
            **self.plan.settings,
        }
        return (
            environment()
            | {f"{PREFIX}{name}": value for name, value in settings.items()}
            | {
                CONFIG_VARIABLE: str(self.folder / "gateway.json"),
                "REDIS_URL": self.redis.url,
                "DATABASE_URL": self.database_url,
            }
        )

    def _gateway(self, name: str, environment: Mapping[str, str]) -> Process:
        port = free_port()
        self.urls.append(f"http://127.0.0.1:{port}")
        command = [sys.executable, "-m", "gunicorn", "-c", "python:gateway_app.gunicorn", "gateway_app:create_app()"]
        own = {**environment, f"{PREFIX}GATEWAY__PORT": str(port)}
        return Process(name, command, own, self.folder / f"{name}.log", lambda _said: _listens(port))

    def _celery(self, name: str, queue: str, app: Sequence[str], environment: Mapping[str, str]) -> Process:
        node = f"{name}@chaos"
        command = [sys.executable, "-m", "celery", *app, "worker", "-Q", queue, "--loglevel", "INFO", "-n", node]
        return Process(node, command, environment, self.folder / f"{name}.log", lambda said: READY in said)

    def _takes_requests(self) -> bool:
        try:
            answers = [requests.get(f"{url}/readyz", timeout=10).json() for url in self.urls]
        except requests.RequestException:
            return False
        return all(set(answer["missing"]) <= {"housekeeper"} for answer in answers)

    def _end_all(self) -> None:
        for process in self.processes:
            process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
