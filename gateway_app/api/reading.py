"""Reading a request: its body, and the query of a list. Nothing that was sent is repeated in an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from flask import Blueprint, g, request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, from_json
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from gateway_app.governance.api_keys import ApiKeys
from gateway_app.pipeline import Pipeline
from tasks.errors import BodyTooLarge, GatewayError, InvalidJson, InvalidRequest, UnsupportedMediaType

M = TypeVar("M", bound=BaseModel)
MAX_ERRORS_SHOWN = 20
MAX_PAGE = 100
MAX_KEY_LENGTH = 255
#: What is read and thrown away of a body that is too large, so that the client gets the answer and not a reset.
_DRAIN_BYTES = 64 * 2**20


def require_key(routes: Blueprint, keys: ApiKeys) -> None:
    """Have every request for `routes` authenticated first: `g.caller` is whose it is."""

    @routes.before_request
    def authenticate() -> None:
        g.caller = keys.authenticate(request.headers.get("Authorization"))


def body() -> bytes:
    """Return the request's body. Raises UnsupportedMediaType, BodyTooLarge, InvalidJson."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    return content()


def content() -> bytes:
    """Return the request's body, of whatever type. Raises BodyTooLarge, InvalidJson."""
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge:
        drain()
        raise BodyTooLarge(f"the body is larger than {request.max_content_length} bytes") from None
    except ClientDisconnected:
        raise InvalidJson("the connection ended before the body did") from None


def idempotency_key() -> str | None:
    """Return the Idempotency-Key header. Raises InvalidRequest if it is none that could be meant."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and (not key.strip() or len(key) > MAX_KEY_LENGTH or not key.isprintable()):
        raise InvalidRequest(f"an Idempotency-Key is 1 to {MAX_KEY_LENGTH} printable characters")
    return key


def submission(pipeline: Pipeline) -> tuple[bytes, str | None]:
    """Return the body of a request for an answer, and its Idempotency-Key. A refusal is recorded before it is raised."""
    try:
        return body(), idempotency_key()
    except GatewayError as refusal:
        pipeline.refuse(g.caller, refusal)
        raise


def parse(content: bytes | str, what: str = "body") -> dict[str, Any]:
    """Return the JSON object that a body, or `what` it is, holds. Raises InvalidJson or InvalidRequest."""
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidJson(f"the {what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the {what} must be a JSON object")
    return value


def validate(model: type[M], content: Any) -> M:
    """Return `content` as a `model`. Raises InvalidRequest, which names each field that is wrong, and why."""
    return _checked(lambda: model.model_validate(content))


def document(model: type[M]) -> M:
    """Return the body as a `model`. Raises as `body`, `parse` and `validate` do."""
    return validate(model, parse(body()))


def options(model: type[M]) -> M:
    """Return the body as a `model` whose fields may all be left out; no body at all does so. Raises as `document`."""
    if not request.mimetype and not request.content_length and not content():
        return validate(model, {})
    return document(model)


def expected_tags() -> frozenset[str] | None:
    """Return the entity tags that If-Match allows what is changed to have; None if it allows any."""
    if "If-Match" not in request.headers or request.if_match.star_tag:
        return None
    # A proxy that compresses answers makes their tags weak ones.
    return frozenset(request.if_match.as_set(include_weak=True))


def query(model: type[M]) -> M:
    """Return the query's parameters as a `model`. Raises InvalidRequest, also if one is given twice."""
    repeated = [name for name, values in request.args.lists() if len(values) > 1]
    if repeated:
        problems = [{"field": name, "message": "may be given once"} for name in repeated[:MAX_ERRORS_SHOWN]]
        raise InvalidRequest("a parameter is given more than once", errors=problems)
    return _checked(lambda: model.model_validate_strings(request.args.to_dict()))


def _checked(make: Callable[[], M]) -> M:
    try:
        return make()
    except ValidationError as error:
        problems = [
            {"field": ".".join(map(str, item["loc"])) or "body", "message": _message(item)}
            for item in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        fields = ", ".join(dict.fromkeys(problem["field"] for problem in problems[:MAX_ERRORS_SHOWN]))
        raise InvalidRequest(f"the request is not valid: {fields}", errors=problems[:MAX_ERRORS_SHOWN]) from None


def _message(item: ErrorDetails) -> str:
    if item["type"] == "extra_forbidden":
        return "is not known here; what could not be honoured is refused, not ignored"
    return item["msg"]


def drain() -> None:
    """Read what is left of a body that is refused, so that its client gets to read the answer."""
    stream, left = request.environ["wsgi.input"], _DRAIN_BYTES
    if "wsgi.input_terminated" not in request.environ:
        # Beyond the body there is no end to be found, but only the client waiting for its answer.
        left = min(left, request.content_length or 0)
    with suppress(OSError):
        while left > 0 and (chunk := stream.read(min(left, 2**16))):
            left -= len(chunk)
