"""A gateway that real clients can connect to, on a free port, in threads of this process.

`serve` serves what a test has configured. `standing` is for the tests of one module to share: it has services and
secrets of its own, and leaves this process's settings as they were.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from werkzeug.serving import WSGIRequestHandler, make_server

from gateway_app import build
from tasks.migrating import upgrade
from tasks.settings import CONFIG_VARIABLE, KEY_BYTES, PREFIX, SECRET_NAMES, settings
from tests.conforming import watched
from tests.conftest import new_key
from tests.services import RedisServer
from tests.workers import ROOT, Worker

START_S = 180.0


class QuietHandler(WSGIRequestHandler):
    """Speaks HTTP/1.1, as production servers do, and logs nothing."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Served:
    """Where the gateway is, and an admin key of the organization `default`."""

    url: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        """Return what authenticates a request."""
        return {"Authorization": f"Bearer {self.key}"}

    def wait_for_a_worker(self) -> None:
        """Return when the gateway says that a worker takes requests."""
        deadline = time.monotonic() + START_S
        while {"database", "queue", "worker"} & {*requests.get(f"{self.url}/readyz", timeout=10).json()["missing"]}:
            assert time.monotonic() < deadline, "no worker became ready"
            time.sleep(0.1)


@contextmanager
def serve(worker: Worker | None = None) -> Iterator[Served]:
    """Serve the configured gateway; with a worker, return when it is ready and stop it at the end.

    Every answer must be as the OpenAPI document says.
    """
    faults: list[str] = []
    app = watched(build(settings()), faults)
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=QuietHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    served = Served(f"http://127.0.0.1:{server.server_port}", new_key("default", "admin"))
    try:
        if worker is not None:
            worker.start()
            served.wait_for_a_worker()
        yield served
    finally:
        if worker is not None:
            worker.stop()
        server.shutdown()
        thread.join()
        server.server_close()
        app.extensions["closing"].close()
    assert not faults, faults


@contextmanager
def standing(folder: Path, model: Path, database_url: str | None = None, **variables: str) -> Iterator[Served]:
    """Serve a gateway with a worker, on a Redis and, if no database is given, an SQLite of its own.

    `variables` are settings without prefix.
    """
    directory = folder / "secrets"
    directory.mkdir()
    for name in SECRET_NAMES:
        (directory / name).write_text(secrets.token_hex(KEY_BYTES), encoding="ascii")
    (folder / "gateway.json").write_text("{}", encoding="utf-8")
    redis_server = RedisServer()
    with ExitStack() as stack, pytest.MonkeyPatch.context() as environment:
        stack.callback(redis_server.close)
        redis_server.start()
        defaults = {
            "SECRETS__DIRECTORY": str(directory),
            "ENGINE__KIND": "simulated",
            "ENGINE__MODEL": str(model),
            "GOVERNANCE__PROFILES_DIRECTORY": str(ROOT / "profiles"),
        }
        for name, value in (defaults | variables).items():
            environment.setenv(f"{PREFIX}{name}", value)
        environment.setenv(CONFIG_VARIABLE, str(folder / "gateway.json"))
        environment.setenv("REDIS_URL", redis_server.url)
        environment.setenv("DATABASE_URL", database_url or f"sqlite:///{folder / 'gateway.db'}")
        settings.cache_clear()
        upgrade(settings().database.url)
        served = stack.enter_context(serve(Worker(folder / "worker.log")))
        environment.undo()
        settings.cache_clear()
        yield served
