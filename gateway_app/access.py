"""A line for each HTTP request: its route, not its path, and never its query, which are a client's text.

Python's `logging` takes longer for a line than some requests take for everything else, so a line is put together here, of parts
that need no more looking at, and written at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from logging import StreamHandler
from typing import Any, NamedTuple

from flask import Flask, request

from tasks.ids import is_request_id
from tasks.logs import bind_request
from tasks.tracing import current_trace_id, is_on

#: Where a WSGI environment has the rule that its path matched, and the id of its trace. Without a rule the path is whatever a
#: client made up.
ROUTE = "metaqore.route"
TRACE_ID = "metaqore.trace_id"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Answered(NamedTuple):
    """A request that took `seconds`, and was sent so many bytes of content. `outcome` is how a stream ended, in a constant word."""

    method: str
    route: str | None
    status: int
    seconds: float
    sent: int
    request_id: str | None
    trace_id: str | None = None
    outcome: str | None = None


class AccessLog:
    """Writes lines to the streams of `handlers`, which may be exchanged meanwhile, as when a log is rotated."""

    def __init__(self, handlers: Sequence[StreamHandler[Any]] = (), *, as_json: bool = True) -> None:
        self._handlers = tuple(handlers)
        self._render = _json if as_json else _text
        self._second = 0
        self._date = ""

    def write(self, request: Answered) -> None:
        """Write one request's line."""
        if not self._handlers:
            return
        if request.method not in _METHODS:
            # A client may make one up.
            request = request._replace(method="OTHER")
        if request.request_id is not None and not is_request_id(request.request_id):
            request = request._replace(request_id=None)
        line = self._render(self._now(), request)
        for handler in self._handlers:
            # A disk that is full, or a pipe that nobody reads any more, must not fail requests.
            with suppress(OSError, ValueError), handler.lock:  # type: ignore[union-attr]
                handler.stream.write(line)
                handler.stream.flush()

    def _now(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:
            # Another thread may be doing so too: the date is set first, so that none takes an older one for this second's.
            self._date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return f"{self._date}.{int((now - second) * 1000):03d}Z"


def _json(at: str, request: Answered) -> str:
    bound = f' "request_id": "{request.request_id}",' if request.request_id else ""
    traced = f' "trace_id": "{request.trace_id}",' if request.trace_id else ""
    ended = f', "outcome": "{request.outcome}"' if request.outcome else ""
    return (
        f'{{"timestamp": "{at}", "level": "info", "logger": "access", "event": "request",{bound}{traced}'
        f' "method": "{request.method}", "route": {json.dumps(request.route)}, "status": {request.status},'
        f' "duration_ms": {request.seconds * 1000:.1f}, "sent": {request.sent}{ended}}}\n'
    )


def _text(at: str, request: Answered) -> str:
    rest = "".join(f" {word}" for word in (request.outcome, request.request_id, request.trace_id) if word)
    route, ms = request.route or "-", request.seconds * 1000
    return f"{at} {request.method} {route} {request.status} {ms:.1f} ms, {request.sent} bytes{rest}\n"


def install(app: Flask) -> None:
    """Have every line that is logged while a request is handled name the task that its path names, or none.

    What a request's own line says of it is noted too, since Flask has let go of it before. Call this after traces were
    arranged for.
    """
    traced = is_on()

    def bind() -> None:
        if request.url_rule is not None:
            request.environ[ROUTE] = request.url_rule.rule
        # What a client made up there is taken out of each line.
        bind_request(request.view_args.get("request_id") if request.view_args else None)
        if traced:
            request.environ[TRACE_ID] = current_trace_id()

    app.before_request(bind)
