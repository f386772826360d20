"""The OpenAPI document, made from the tables of operations and the models they name."""

from __future__ import annotations

from typing import Any

from gateway_app.openapi import audit, batches, cache, chat, health, policy, profiles, responses, sockets, tasks
from gateway_app.openapi.components import components
from gateway_app.openapi.operation import Operation
from gateway_app.openapi.problems import ErrorAnswers
from gateway_app.openapi.writer import Writer
from tasks.errors import MethodNotAllowed, NotFound

OPERATIONS: tuple[Operation, ...] = (
    *tasks.OPERATIONS,
    *chat.OPERATIONS,
    *responses.OPERATIONS,
    *batches.OPERATIONS,
    *profiles.OPERATIONS,
    *cache.OPERATIONS,
    *policy.OPERATIONS,
    *audit.OPERATIONS,
    *sockets.OPERATIONS,
    *health.OPERATIONS,
)

DESCRIPTION = """\
A gateway for agents on your own GPUs: governed, recorded, durable, streamed.

Errors are problem details (RFC 9457); under the paths of OpenAI's API they are OpenAI's error object. Both carry the
same stable `code`, a `hint` and `retryable`; docs/errors.md lists all codes. A path that there is not answers
`not_found`, a method that a path does not have `method_not_allowed` with the Allow header. A field of a body
that is not described here is refused, not ignored.
"""
TAGS = {
    "tasks": "The native API: submit, poll, watch, cancel.",
    "OpenAI": "What OpenAI's clients speak. An agent is a model.",
    "policy": "What an organization allows, and who changed it.",
    "audit": "The record of an organization's requests and changes. Any of its keys may read it.",
    "profiles": "Agents: a long, constant prompt each, in versions.",
    "cache": "What the workers' KV caches hold of an organization's profiles.",
    "sockets": "Streams over WebSockets, one task or many.",
    "health": "For load balancers and operators; without a key.",
}
_TEXT = {"type": "string"}
HEADERS: dict[str, dict[str, Any]] = {
    "Allow": {"description": "The methods that the path has.", "required": True, "schema": _TEXT},
    "Content-Disposition": {"description": "The file's name.", "required": True, "schema": _TEXT},
    "ETag": {"description": "The state of what is shown, for If-Match.", "required": True, "schema": _TEXT},
    "Idempotent-Replayed": {
        "description": "There, this is the answer to an earlier request with the same Idempotency-Key.",
        "schema": {"const": "true"},
    },
    "Location": {"description": "Where the new resource is.", "required": True, "schema": _TEXT},
    "Retry-After": {"description": "In seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}},
    "Upgrade": {"description": "`websocket`.", "required": True, "schema": _TEXT},
    "WWW-Authenticate": {"description": "How to authenticate.", "required": True, "schema": _TEXT},
    "X-Request-Id": {
        "description": "The request's id in /v1/tasks and in the audit.",
        "required": True,
        "schema": _TEXT,
    },
    "x-should-retry": {
        "description": "Tells OpenAI's clients what `retryable` says.",
        "required": True,
        "schema": {"enum": ["true", "false"]},
    },
}


def document() -> dict[str, Any]:
    """Return the whole document."""
    schemas, errors = components(OPERATIONS), ErrorAnswers()
    writer = Writer(schemas, errors)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = writer.operation(operation)
    for anywhere in ("/", "/v1/models"):
        # No operation has these: they answer where there is none.
        errors.of(anywhere, (NotFound, MethodNotAllowed))
    return {
        "openapi": "3.1.0",
        "info": {"title": "MetaQore LLM gateway", "version": "1", "description": DESCRIPTION},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "`flask keys create` makes a key."}
            },
            "headers": HEADERS,
            "responses": dict(sorted(errors.answers.items())),
            "schemas": schemas.schemas,
        },
    }
