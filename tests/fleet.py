"""Gateways that can be killed: processes of their own, as many as a test wants, on one Redis and one SQLite."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
import redis
import requests

from tasks.migrating import upgrade
from tasks.settings import CONFIG_VARIABLE, KEY_BYTES, PREFIX, SECRET_NAMES, settings
from tasks.stream import stream_key
from tests.conftest import new_key
from tests.measuring import COVERAGE_VARIABLES
from tests.services import RedisServer, free_port, wait_until
from tests.workers import ROOT, Worker

READY_S = 60


class Gateway:
    """One gateway process, as the Procfile starts it, with further `options` of gunicorn."""

    def __init__(self, log: Path, environment: dict[str, str], *options: str) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        gunicorn = [sys.executable, "-m", "gunicorn", "-c", "python:gateway_app.gunicorn", *options]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*gunicorn, "gateway_app:create_app()"],
                cwd=ROOT,
                stdout=output,
                stderr=output,
                env=environment | {f"{PREFIX}GATEWAY__PORT": str(port)},
                process_group=0,
            )

    def ready(self) -> bool:
        """Tell whether it and a worker take requests."""
        try:
            missing = requests.get(f"{self.url}/readyz", timeout=10).json()["missing"]
            return not {"database", "queue", "worker"} & set(missing)
        except (requests.ConnectionError, requests.Timeout):
            # While its worker is being started, connections are taken and not served.
            return False

    def kill(self) -> None:
        """Kill it as the kernel would, master and worker."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@dataclass
class Fleet:
    """Gateway processes, and keys of two organizations."""

    folder: Path
    environment: dict[str, str]
    key: str
    other_key: str
    gateways: list[Gateway] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Return where the first gateway is."""
        return self.gateways[0].url

    @property
    def headers(self) -> dict[str, str]:
        """Return what authenticates a request."""
        return {"Authorization": f"Bearer {self.key}"}

    def add_gateway(self) -> Gateway:
        """Start another gateway process; return it when it takes requests.

        Coverage does not measure it, which would take as long again: it is killed in the end, and what was measured is lost.
        """
        environment = {name: value for name, value in self.environment.items() if name not in COVERAGE_VARIABLES}
        gateway = Gateway(self.folder / "gateway.log", environment)
        self.gateways.append(gateway)
        wait_until(gateway.ready, READY_S, "a ready gateway")
        return gateway

    def kill(self) -> None:
        """Kill every gateway."""
        for gateway in self.gateways:
            gateway.kill()

    def client(self, gateway: Gateway | None = None, key: str | None = None) -> openai.OpenAI:
        """Return OpenAI's client of a gateway, the first one unless given."""
        url = (gateway or self.gateways[0]).url
        return openai.OpenAI(base_url=f"{url}/v1", api_key=key or self.key, max_retries=0, timeout=30)

    def forget(self, request_id: str) -> None:
        """Have Redis lose a request's stream."""
        with redis.Redis.from_url(self.environment["REDIS_URL"]) as client:
            assert client.delete(stream_key("metaqore:", request_id)) == 1


@contextmanager
def own_services(folder: Path, model: Path, **variables: str) -> Iterator[dict[str, str]]:
    """Configure this process for an empty Redis and SQLite of its own; `variables` are settings without prefix.

    Yields the environment that says so. For fixtures of a whole module: what they begin keeps this configuration.
    """
    (folder / "secrets").mkdir(mode=0o700)
    for name in SECRET_NAMES:
        (folder / "secrets" / name).write_text(secrets.token_hex(KEY_BYTES), encoding="ascii")
    (folder / "gateway.json").write_text('{"gateway": {"host": "127.0.0.1"}}', encoding="utf-8")
    redis_server = RedisServer()
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        stack.callback(settings.cache_clear)
        stack.callback(redis_server.close)
        redis_server.start()
        defaults = {
            "SECRETS__DIRECTORY": str(folder / "secrets"),
            "ENGINE__KIND": "simulated",
            "ENGINE__MODEL": str(model),
            "GOVERNANCE__PROFILES_DIRECTORY": str(ROOT / "profiles"),
        }
        environment = {f"{PREFIX}{name}": value for name, value in (defaults | variables).items()} | {
            CONFIG_VARIABLE: str(folder / "gateway.json"),
            "REDIS_URL": redis_server.url,
            "DATABASE_URL": f"sqlite:///{folder / 'gateway.db'}",
        }
        for name, value in environment.items():
            patch.setenv(name, value)
        settings.cache_clear()
        upgrade(settings().database.url)
        yield environment


@contextmanager
def fleet(folder: Path, model: Path, **variables: str) -> Iterator[Fleet]:
    """Return one gateway process with a worker, on services of their own."""
    worker = Worker(folder / "worker.log")
    with own_services(folder, model, **variables) as environment, ExitStack() as stack:
        stack.callback(worker.stop)
        worker.start()
        made = Fleet(folder, os.environ | environment, new_key("default"), new_key("other"))
        stack.callback(made.kill)
        made.add_gateway()
        yield made
