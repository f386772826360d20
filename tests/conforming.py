"""Holds answers against the OpenAPI document's models, which here refuse a field that they do not know.

`watched` does so for every answer of an application, so that any test of the API tests its description as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus

from flask import Flask, Response, request
from pydantic import BaseModel, ValidationError

from gateway_app.openai.errors import PATHS
from gateway_app.openapi.document import HEADERS, OPERATIONS
from gateway_app.openapi.operation import Operation, Reply
from gateway_app.openapi.problems import OpenAIError, Problem

BY_ROUTE: dict[tuple[str, str], Operation] = {(each.method.upper(), each.path): each for each in OPERATIONS}


def path_of(rule: str) -> str:
    """Return one of Flask's rules as the document writes it."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def watched(app: Flask, faults: list[str]) -> Flask:
    """Return the application; what is wrong with any answer it gives from now on is added to `faults`.

    The events of streams are not looked at, nor what Flask answers once a WebSocket has ended, which nobody is sent, nor
    routes that the document does not name.
    """

    def check(response: Response) -> Response:
        path = path_of(request.url_rule.rule) if request.url_rule is not None else ""
        was_socket = "Upgrade" in request.headers and response.status_code == HTTPStatus.OK
        if (request.method, path) in BY_ROUTE and not was_socket:
            body = b"" if response.is_streamed else response.get_data()
            try:
                conforms(request.method, path, response.status_code, dict(response.headers), body)
            except (AssertionError, ValidationError) as error:
                faults.append(f"{request.method} {path} {response.status_code}: {error}")
        return response

    app.after_request(check)
    return app


def conforms(method: str, path: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Fail unless the document's operation can give this answer. The events of a stream are left out."""
    operation = BY_ROUTE[method, path]
    if status in operation.replies:
        _is_reply(operation.replies[status], headers, body)
    else:
        _is_error(operation, status, headers, body)


def _is_reply(reply: Reply, headers: Mapping[str, str], body: bytes) -> None:
    missing = [name for name in reply.headers if HEADERS[name].get("required") and name not in headers]
    assert not missing, f"the answer lacks {missing}"
    media_type = headers.get("Content-Type", "").partition(";")[0]
    if media_type == "text/event-stream":
        assert reply.stream is not None
    elif media_type == "application/json" and not reply.bytes_types:
        assert reply.model is not None
        reply.model.model_validate_json(body, strict=True)
    else:
        assert media_type in (*reply.bytes_types, "") or (not body and reply.model is None)


def _is_error(operation: Operation, status: int, headers: Mapping[str, str], body: bytes) -> None:
    openai = operation.path.startswith(PATHS)
    error = (
        OpenAIError.model_validate_json(body, strict=True).error
        if openai
        else Problem.model_validate_json(body, strict=True)
    )
    codes = {kind.code: kind.status for kind in operation.all_errors}
    assert codes.get(error.code) == status, f"{operation.name} is not said to answer {status} {error.code}"
    assert headers["Content-Type"] == ("application/json" if openai else "application/problem+json")


def events(body: str) -> Iterable[tuple[str, str, str]]:
    """Yield the name, the id and the data of each event of a stream."""
    for block in filter(None, body.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            yield fields.get("event", "message"), fields.get("id", ""), fields["data"]


def conforming_events(operation: str, body: str) -> list[str]:
    """Return the names of a stream's events. Fails unless each is one that the document describes."""
    (stream,) = (
        reply.stream for each in OPERATIONS if each.name == operation for reply in each.replies.values() if reply.stream
    )
    names = []
    for name, cursor, data in events(body):
        names.append(name)
        assert bool(cursor) is stream.cursors
        if data != stream.last:
            assert any(_is(model, data) for model in stream.events[name]), f"no model of {name} takes {data}"
    return names


def _is(model: type[BaseModel], data: str) -> bool:
    try:
        model.model_validate_json(data, strict=True)
    except ValidationError:
        return False
    return True
