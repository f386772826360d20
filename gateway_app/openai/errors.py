"""Errors as OpenAI's clients expect them, with our stable codes."""

from __future__ import annotations

from typing import Any

from tasks.errors import GatewayError

#: Paths that answer as OpenAI's API does; all others answer with problem details.
PATHS = ("/v1/chat/", "/v1/models", "/v1/responses", "/v1/files", "/v1/batches")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


def error_object(error: GatewayError) -> dict[str, Any]:
    """Return OpenAI's error object for `error`, with the hint and whatever else it knows."""
    errors = error.extensions.get("errors") or []
    return {
        "error": {
            "message": error.detail,
            "type": _TYPES.get(error.status, "server_error"),
            "param": error.extensions.get("param") or (errors[0]["field"] if errors else None),
            "code": error.code,
            "hint": error.hint,
            "retryable": error.retryable,
            "request_id": error.request_id,
            **{name: value for name, value in error.extensions.items() if name != "param"},
        }
    }
