"""Counting HTTP requests, by the rule that a path matched and never by the path: that is a client's text.

This is done around the application and not by hooks of Flask's, which would cost several times as much: a request pays
some microseconds. Children of a metric are looked up once for each rule.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable
from http import HTTPMethod
from typing import Any

from flask import Flask
from prometheus_client import Counter, Histogram

from gateway_app.access import ROUTE
from tasks.metrics import gateway as metrics
from tasks.metrics.shared import OTHER

#: In place of the route of a path that there is not.
UNMATCHED = "unmatched"
METHODS = frozenset(HTTPMethod)
Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]


def install(app: Flask) -> None:
    """Count every request of `app`. Call this when it has all its routes, and its access log is arranged for."""
    sockets = frozenset(rule.rule for rule in app.url_map.iter_rules() if rule.websocket)
    app.wsgi_app = _counted(app.wsgi_app, sockets)  # type: ignore[assignment, method-assign]


def _counted(answer: Wsgi, sockets: frozenset[str]) -> Wsgi:
    def counted(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        status = "500"

        def start(line: str, *more: Any) -> Any:
            nonlocal status
            status = line[:3]
            return start_response(line, *more)

        began = time.monotonic()
        metrics.HTTP_IN_PROGRESS.inc()
        try:
            return answer(environ, start)
        except StopIteration:
            # Whoever takes the connection, to serve a stream or a socket, starts the response without the server.
            status = "200"
            raise
        finally:
            metrics.HTTP_IN_PROGRESS.dec()
            method, rule = environ["REQUEST_METHOD"], environ.get(ROUTE)
            # A socket's view returns when the socket has ended, perhaps after days.
            was_socket = status == "200" and rule in sockets
            answered, seconds = _children(method if method in METHODS else OTHER, rule, "101" if was_socket else status)
            answered.inc()
            if not was_socket:
                seconds.observe(time.monotonic() - began)

    return counted


@functools.cache
def _children(method: str, rule: str | None, status: str) -> tuple[Counter, Histogram]:
    route = UNMATCHED if rule is None else template(rule)
    return metrics.HTTP_REQUESTS.labels(method, route, status), metrics.HTTP_SECONDS.labels(method, route)


def template(rule: str) -> str:
    """Return one of Flask's rules as the OpenAPI document writes it."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)
