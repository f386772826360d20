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
from typing import Any

from flask import Flask, request

from tasks.ids import is_request_id
from tasks.logs import bind_request
from tasks.tracing import current_trace_id, is_on

#: Where a WSGI environment has the rule that its path matched, and the id of its trace. Without a rule the path is whatever a
#: client made up.
ROUTE = "metaqore.route"
TRACE_ID = "metaqore.trace_id"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class AccessLog:
    """Writes lines to the streams of `handlers`, which may be exchanged meanwhile, as when a log is rotated."""

    def __init__(self, handlers: Sequence[StreamHandler[Any]] = (), *, as_json: bool = True) -> None:
        self._handlers = tuple(handlers)
        self._as_json = as_json
        self._second = 0
        self._date = ""

    def write(
        self,
        method: str,
        route: str | None,
        status: int,
        seconds: float,
        sent: int,
        request_id: str | None,
        trace_id: str | None = None,
        outcome: str | None = None,
    ) -> None:
        """Write that a request took so many `seconds`, and that so many bytes of content were `sent`.

        `outcome` is how a stream ended, in a constant word.
        """
        if not self._handlers:
            return
        if method not in _METHODS:
            # A client may make one up.
            method = "OTHER"
        if request_id is not None and not is_request_id(request_id):
            request_id = None
        line = (self._json if self._as_json else self._text)(
            self._now(), method, route, status, seconds * 1000, sent, request_id, trace_id, outcome
        )
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

    @staticmethod
    def _json(
        at: str,
        method: str,
        route: str | None,
        status: int,
        ms: float,
        sent: int,
        request_id: str | None,
        trace_id: str | None,
        outcome: str | None,
    ) -> str:
        bound = f' "request_id": "{request_id}",' if request_id else ""
        traced = f' "trace_id": "{trace_id}",' if trace_id else ""
        ended = f', "outcome": "{outcome}"' if outcome else ""
        return (
            f'{{"timestamp": "{at}", "level": "info", "logger": "access", "event": "request",{bound}{traced}'
            f' "method": "{method}", "route": {json.dumps(route)}, "status": {status}, "duration_ms": {ms:.1f},'
            f' "sent": {sent}{ended}}}\n'
        )

    @staticmethod
    def _text(
        at: str,
        method: str,
        route: str | None,
        status: int,
        ms: float,
        sent: int,
        request_id: str | None,
        trace_id: str | None,
        outcome: str | None,
    ) -> str:
        rest = "".join(f" {word}" for word in (outcome, request_id, trace_id) if word)
        return f"{at} {method} {route or '-'} {status} {ms:.1f} ms, {sent} bytes{rest}\n"


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
