"""gunicorn's settings: threads for requests, which wait for the database or an answer, and a loop for streams."""

from __future__ import annotations

import gc
import resource
import threading
import time
from contextlib import suppress
from typing import Any

from gateway_app.profiles.pins import Pins
from tasks.errors import ConfigurationError, GatewayError
from tasks.logs import get_logger
from tasks.settings import settings

try:
    _gateway, _logs = settings().gateway, settings().logs
except ConfigurationError as error:
    raise SystemExit(f"error: {error.detail}\nhint: {error.hint}") from None

bind = f"{_gateway.host}:{_gateway.port}"
worker_class = "gateway_app.gunicorn_worker.Worker"
workers = 1
threads = _gateway.threads
# Streams are not among these; kept-alive connections without a request are.
worker_connections = _gateway.threads + 1000
# Longer than the 60 s of most proxies: the side that sends requests must be the one that closes an idle connection.
keepalive = 65
# Whoever kills what is left must wait for longer: deploy/, docs/deploying.md.
graceful_timeout = 30
# Of the graceful timeout, what is kept for closing everything when the streams have ended, or have been ended.
CLOSING_S = 2.0
# A stream is an open file, and many systems begin with few.
OPEN_FILES = 10_240
# A thread that streams for an hour is healthy: this is about the worker process's own heartbeat.
timeout = 60
control_socket_disable = True
logger_class = "gateway_app.gunicorn_log.GunicornLogger"
loglevel = _logs.level
accesslog = "-" if _logs.access else None


def post_worker_init(worker: Any) -> None:
    """Let streams take their sockets: this worker knows how to let go of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    pump = worker.wsgi.extensions["pump"]
    pump.access = worker.log.requests
    pump.enabled = True
    threading.Thread(target=_catch_up, args=(worker.wsgi.extensions["pins"],), name="pins", daemon=True).start()
    # What there is by now stays: searching all of it for garbage would hold every stream up, again and again.
    gc.collect()
    gc.freeze()


def _catch_up(pins: Pins) -> None:
    try:
        pins.catch_up()
    except GatewayError as error:
        # What is pinned is computed with its first request, then.
        get_logger(__name__).warning("what is pinned was not looked at", code=error.code)


def worker_exit(_server: object, worker: Any) -> None:
    """Let streams end for as long as a graceful stop has left, then close everything."""
    if worker.wsgi is not None:
        grace_s = max(0.0, worker.stops_at - time.monotonic() - CLOSING_S)
        worker.wsgi.extensions["pump"].close(grace_s)
        worker.wsgi.extensions["closing"].close()
