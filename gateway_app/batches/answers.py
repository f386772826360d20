"""What a batch's files say of a line: one JSON object each, in OpenAI's form.

A request that was answered, be it with an error, has a `response`; one that never got so far has an `error` instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json
from sqlalchemy.engine import Row

from gateway_app.openai.errors import error_object
from tasks.crypto import unseal
from tasks.errors import GatewayError, by_code

_UNFINISHED = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was cancelled before it was executed to its end."),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of a batch's output file, or of its error file."""

    text: bytes
    succeeded: bool


def refusal(error: GatewayError) -> dict[str, Any]:
    """Return a refusal's status code and body, as the endpoint would have answered it."""
    return {"status_code": error.status, "body": error_object(error)}


def succeeded(item: Row[Any], body: Mapping[str, Any]) -> Answer:
    """Return the line of a request that completed with `body`."""
    response = {"status_code": 200, "request_id": item.request_id, "body": body}
    return Answer(_line(item, response=response), succeeded=True)


def failed(item: Row[Any], key: bytes) -> Answer:
    """Return the line of a request that did not complete. `key` opens what is stored of its refusal."""
    if item.state in _UNFINISHED:
        code, message = _UNFINISHED[item.state]
        return Answer(_line(item, error={"code": code, "message": message}), succeeded=False)
    if item.error is not None:
        told = from_json(unseal(key, item.error, f"error:{item.batch_id}:{item.line_number}"))
    else:
        error = by_code(item.error_code)()
        error.request_id = item.request_id
        told = refusal(error)
    response = {"status_code": told["status_code"], "request_id": item.request_id, "body": told["body"]}
    return Answer(_line(item, response=response), succeeded=False)


def _line(item: Row[Any], **values: Any) -> bytes:
    line = {
        "id": f"batch_req_{item.batch_id.removeprefix('batch_')}{item.line_number:06d}",
        "custom_id": item.custom_id,
        "response": None,
        "error": None,
        **values,
    }
    return to_json(line) + b"\n"
