"""An HTTP request as a span: the trace's first one here, and the parent of what a request's way in tells of itself.

The span lasts until the last byte is made: of a stream until its last frame, also where the loop of `streaming.pump` serves
it. A call about a request that another call made, as watching it or cancelling it, is a trace of its own and links to that one's.
Routes are told by their rules: a path or a query string is the client's text.
"""

from __future__ import annotations

from http import HTTPMethod, HTTPStatus

from flask import Flask, Response, g, request

from gateway_app.streaming.pump import Taken
from tasks import tracing
from tasks.tracing import CURRENT, Span
from tasks.tracing.context import pack

#: What is asked every few seconds, by machines that look whether all is well: no trace for each.
_PROBES = ("/healthz", "/readyz", "/metrics")


def install(app: Flask, *, accept_context: bool) -> None:
    """Record the requests of `app`, if this process records anything.

    With `accept_context` the trace that a client names goes on.
    """
    if tracing.is_on():
        app.before_request(lambda: _begin(accept_context))
        app.after_request(_answered)
        app.teardown_request(_end)


def _begin(accept_context: bool) -> None:
    method = request.method if request.method in HTTPMethod.__members__ else "_OTHER"
    route = request.url_rule.rule if request.url_rule is not None else None
    if route in _PROBES:
        return
    received = pack(request.headers.get("traceparent"), request.headers.get("tracestate")) if accept_context else None
    attributes = {"http.request.method": method, "url.scheme": request.scheme}
    if route is not None:
        attributes["http.route"] = route
    g.span = tracing.begin(f"{method} {route}" if route else method, "server", received, attributes)
    CURRENT.set(g.span)


def _answered(response: Response) -> Response:
    span: Span | None = g.get("span")
    if span is None:
        return response
    rule, status = request.url_rule, response.status_code
    if rule is not None and rule.websocket and status == HTTPStatus.OK:
        # What flask-sock answers when a socket has ended; its client was told something else.
        status = HTTPStatus.SWITCHING_PROTOCOLS
    span.set({"http.response.status_code": int(status)})
    if isinstance(response, Taken):
        response.span = g.pop("span")
    elif response.is_streamed:
        response.call_on_close(g.pop("span").end)
    return response


def _end(_error: BaseException | None) -> None:
    CURRENT.set(tracing.UNRECORDED)
    span: Span | None = g.pop("span", None)
    if span is not None:
        span.end()


def apart(name: str) -> Span:
    """Begin a trace for one of many things that come over one connection, or from none, linked to the current span."""
    span = tracing.begin(name, "internal")
    span.link(tracing.current().context)
    return span
