"""Errors as RFC 9457 problem details; on OpenAI's paths as OpenAI's error object, with the same codes."""

from __future__ import annotations

from typing import Any

from flask import Flask, Response, json, request
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WerkzeugMethodNotAllowed

from gateway_app.openai.errors import PATHS, error_object
from tasks import errors, tracing
from tasks.logs import get_logger
from tasks.metrics import gateway as metrics

logger = get_logger(__name__)

_BY_STATUS = {
    404: errors.NotFound,
    405: errors.MethodNotAllowed,
    413: errors.BodyTooLarge,
    415: errors.UnsupportedMediaType,
}


def install(app: Flask) -> None:
    """Answer every error of `app` with a problem document."""
    app.register_error_handler(errors.GatewayError, respond)
    app.register_error_handler(HTTPException, _from_http)
    app.register_error_handler(Exception, _from_bug)


def describe(error: errors.GatewayError) -> dict[str, Any]:
    """Return the problem document of `error`."""
    problem = {
        "type": f"urn:metaqore:error:{error.code}",
        "title": error.title(),
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "hint": error.hint,
        "retryable": error.retryable,
        **error.extensions,
    }
    if error.request_id is not None:
        problem["request_id"] = error.request_id
    return problem


def respond(error: errors.GatewayError) -> Response:
    """Answer with `error`, in the form that the path's clients expect."""
    metrics.HTTP_ERRORS.labels(error.code).inc()
    _trace(error)
    if request.path.startswith(PATHS):
        response = Response(json.dumps(error_object(error)), error.status, content_type="application/json")
        # OpenAI's clients would repeat every conflict and server error by themselves.
        response.headers["x-should-retry"] = "true" if error.retryable else "false"
    else:
        response = Response(json.dumps(describe(error)), error.status, content_type="application/problem+json")
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if error.status == errors.Unauthenticated.status:
        response.headers["WWW-Authenticate"] = 'Bearer realm="metaqore"'
    return response


def _trace(error: errors.GatewayError) -> None:
    """Note the error in the request's span, where one is recorded. A refusal is no failure of the gateway's."""
    span = tracing.current()
    span.set({"metaqore.error.code": error.code})
    if error.request_id is not None:
        span.set({"metaqore.request.id": error.request_id})
    if error.status >= errors.GatewayError.status:
        span.fail(error.code)


def _from_http(error: HTTPException) -> Response:
    kind = _BY_STATUS.get(error.code or 500)
    if kind is None:
        kind = errors.InvalidRequest if (error.code or 500) < 500 else errors.GatewayError  # noqa: PLR2004
    response = respond(kind())
    if isinstance(error, WerkzeugMethodNotAllowed) and error.valid_methods:
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods))
    return response


def _from_bug(error: Exception) -> Response:
    # Its text, which may quote what was sent, is taken out of the log.
    route = request.url_rule.rule if request.url_rule is not None else None
    logger.error("unexpected error", method=request.method, route=route, exc_info=error)
    return respond(errors.GatewayError())
