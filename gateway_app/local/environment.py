"""Where the services of this start are to be found, and the environment that tells their processes so.

Services that the operator names are used; the others are ours: Redis on the usual port or a free one, SQLite in
`var/`, the gateway on loopback. Every process gets the result in its environment, and `var/run/env` has it for a
second terminal, with the settings that this start was given: `set -a; . var/run/env; set +a`, then `flask …` and
`celery …` reach the same services and mean the same model.
"""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway_app.local.folder import Folder
from gateway_app.local.ports import free_port
from gateway_app.local.secrets import write_once
from tasks.settings import PREFIX, GatewayGroup, Settings

HOST_VARIABLE, PORT_VARIABLE = "METAQORE_GATEWAY__HOST", "METAQORE_GATEWAY__PORT"
LOG_FORMAT_VARIABLE = "METAQORE_LOGS__FORMAT"
GATEWAY_METRICS_VARIABLE = "METAQORE_METRICS__GATEWAY_PORT"
WORKER_METRICS_VARIABLE = "METAQORE_METRICS__WORKER_PORT"
HOUSEKEEPER_METRICS_VARIABLE = "METAQORE_METRICS__HOUSEKEEPER_PORT"
LOOPBACK = "127.0.0.1"
REDIS_PORT = 6379
#: Settings named so hold keys, and stay in the environment they were given in.
SECRETS = f"{PREFIX}SECRETS__"
SQLITE = "sqlite:///"
#: Addresses to listen on that are none to connect to.
ANY_ADDRESS = {"0.0.0.0": LOOPBACK, "::": "[::1]"}  # noqa: S104  nothing is bound to them here


@dataclass(frozen=True, slots=True)
class Environment:
    """The addresses of this start. `redis_port` is None where Redis is not ours.

    Metrics are on ports of `metrics_host`, 0 is none: a worker's, a housekeeper's, and, unless it is the gateway's own, a
    gateway's.
    """

    host: str
    port: int
    redis_url: str
    redis_port: int | None
    redis_password: str | None
    database_url: str
    metrics_host: str = LOOPBACK
    worker_metrics_port: int = 0
    housekeeper_metrics_port: int = 0
    gateway_metrics_port: int | None = None

    @property
    def url(self) -> str:
        """Return where a client on this machine finds the gateway."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{ANY_ADDRESS.get(self.host, host)}:{self.port}"

    @property
    def metrics_urls(self) -> list[str]:
        """Return where Prometheus on this machine finds the metrics of gateway, worker and housekeeper."""
        host = ANY_ADDRESS.get(self.metrics_host, self.metrics_host)
        ports = (self.gateway_metrics_port, self.worker_metrics_port, self.housekeeper_metrics_port)
        own = [f"{self.url}/metrics"] if self.gateway_metrics_port is None else []
        return [*own, *(f"http://{host}:{port}/metrics" for port in ports if port)]

    def variables(self) -> dict[str, str]:
        """Return the variables that say this to any process of the project."""
        own = self.gateway_metrics_port
        return {
            "REDIS_URL": self.redis_url,
            "DATABASE_URL": self.database_url,
            HOST_VARIABLE: self.host,
            PORT_VARIABLE: str(self.port),
            WORKER_METRICS_VARIABLE: str(self.worker_metrics_port),
            HOUSEKEEPER_METRICS_VARIABLE: str(self.housekeeper_metrics_port),
            **({} if own is None else {GATEWAY_METRICS_VARIABLE: str(own)}),
        }

    def for_children(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return the whole environment of a child process."""
        # Without compiled modules, every start would compile thousands of vLLM's again.
        kept = {name: value for name, value in inherited.items() if name != "PYTHONDONTWRITEBYTECODE"}
        # Somebody reads these logs, and the end of one is shown where something fails.
        kept.setdefault(LOG_FORMAT_VARIABLE, "console")
        return {**kept, **self.variables(), "PYTHONUNBUFFERED": "1"}

    def write(self, folder: Folder, given: Mapping[str, str] = os.environ) -> None:
        """Write the variables for a shell to read, with the settings `given` to this start, and the port for scripts."""
        kept = {name: value for name, value in given.items() if name.startswith(PREFIX) and SECRETS not in name}
        lines = (f"{name}={shlex.quote(value)}\n" for name, value in {**kept, **self.variables()}.items())
        folder.write_private(folder.run / "env", "".join(lines))
        folder.write_private(folder.run / "gateway.port", f"{self.port}\n")


def decide(settings: Settings, folder: Folder, given: Mapping[str, str] = os.environ) -> Environment:
    """Choose services and ports. Raises ConfigurationError if the port that was asked for is taken."""
    host = settings.gateway.host if HOST_VARIABLE in given else LOOPBACK
    port = free_port(host, settings.gateway.port, exactly=PORT_VARIABLE in given)
    redis_url, redis_port, password = settings.gateway.request_queue_url, None, None
    if not given.get("REDIS_URL") and redis_url == GatewayGroup().request_queue_url:
        password = _redis_password(folder)
        redis_port = free_port(LOOPBACK, REDIS_PORT, promised=[port])
        redis_url = f"redis://:{password}@{LOOPBACK}:{redis_port}/0"
    taken = [port, redis_port or 0]
    metrics = settings.metrics
    for wanted in (metrics.worker_port, metrics.housekeeper_port, metrics.gateway_port):
        taken.append(free_port(metrics.host, wanted, promised=taken) if wanted else 0)
    worker, housekeeper, own = taken[2:]
    database_url = _absolute(settings.database.url, folder.root)
    return Environment(
        host,
        port,
        redis_url,
        redis_port,
        password,
        database_url,
        metrics.host,
        worker,
        housekeeper,
        own if metrics.gateway_port is not None else None,
    )


def _redis_password(folder: Folder) -> str:
    path = folder.secrets / "redis_password"
    write_once(path, secrets.token_hex(32) + "\n")
    return path.read_text("ascii").strip()


def _absolute(url: str, root: Path) -> str:
    """Return the database's URL in a form that means the same in every folder."""
    path = url.removeprefix(SQLITE)
    return url if path in (url, "", ":memory:") else f"{SQLITE}{(root / path).resolve()}"
