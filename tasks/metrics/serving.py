"""Telling the metrics of a process that serves no HTTP otherwise, on a small server of its own.

Watching must never be why something stops. Where the port is taken, the next ones are tried, so that several workers run
on one host with the same settings; where none can be had, the process goes on unwatched, and says so in its log.

`/healthz` is there too, for whoever restarts what hangs: 200 while the process does its work, 503 and what is wrong when it
does not. An outage of Redis or the database is nothing that a restart mends, and does not count.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from prometheus_client import start_http_server
from prometheus_client.registry import CollectorRegistry

from tasks.logs import get_logger

logger = get_logger(__name__)
#: Ports that are tried, the one that was asked for included.
PORTS = 10

Wrong = Callable[[], str | None]


def serve(registry: CollectorRegistry, host: str, port: int, wrong: Wrong = lambda: None) -> Callable[[], None]:
    """Serve `registry` on the first free port from `port` on; 0 serves nothing. Return what ends it. Never raises.

    `wrong` returns why the process had better be restarted, or None; it is called in a thread of the server's.
    """
    for candidate in range(port, min(port + PORTS, 2**16)) if port else ():
        try:
            return _serve(registry, host, candidate, wrong)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                logger.warning("metrics cannot be served", host=host, port=candidate, why=error.strerror)
                return _nothing
    if port:
        logger.warning("metrics cannot be served: every port is taken", host=host, first=port, tried=PORTS)
    return _nothing


def _serve(registry: CollectorRegistry, host: str, port: int, wrong: Wrong) -> Callable[[], None]:
    server, thread = start_http_server(port, host, registry)
    server.set_app(_with_health(server.get_app(), wrong))

    def end() -> None:
        with suppress(OSError):
            # It wakes the server, which by itself would look twice a second whether it is to end.
            server.socket.shutdown(socket.SHUT_RDWR)
        server.shutdown()
        server.server_close()
        thread.join()

    logger.info("metrics are served", host=host, port=port)
    return end


def _with_health(metrics: Any, wrong: Wrong) -> Callable[[dict[str, Any], Any], Iterable[bytes]]:
    """Return a WSGI application that answers `/healthz` itself, and leaves all else to `metrics`."""

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            answered: Iterable[bytes] = metrics(environ, start_response)
            return answered
        problem = wrong()
        status = "503 Service Unavailable" if problem else "200 OK"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{problem or 'ok'}\n".encode()]

    return answer


def _nothing() -> None:
    """End what was not begun."""
