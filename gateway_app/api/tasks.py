"""`/v1/tasks`: submit a task, poll it, watch it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from flask import Blueprint, Response, g, json, jsonify, request, url_for
from sqlalchemy.engine import Row
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge

from gateway_app.governance.api_keys import ApiKeys
from gateway_app.pipeline import Pipeline
from gateway_app.streaming.watch import Watcher
from tasks.errors import BodyTooLarge, GatewayError, InvalidJson, NotFound, UnsupportedMediaType, by_code
from tasks.ids import is_request_id
from tasks.stream import Cursor, Frame

#: What is read and thrown away of a body that is too large, so that the client gets the answer and not a reset.
_DRAIN_BYTES = 64 * 2**20


def blueprint(keys: ApiKeys, pipeline: Pipeline, watcher: Watcher) -> Blueprint:
    """Return the routes, over what they need."""
    tasks = Blueprint("tasks", __name__, url_prefix="/v1/tasks")

    @tasks.before_request
    def authenticate() -> None:
        g.caller = keys.authenticate(request.headers.get("Authorization"))

    @tasks.post("")
    def submit() -> tuple[Response, int, dict[str, str]]:
        try:
            body = _body()
        except GatewayError as refusal:
            pipeline.refuse(g.caller, refusal)
            raise
        accepted = pipeline.submit(g.caller, body)
        links = _links(accepted.request_id)
        answer = jsonify(
            id=accepted.request_id,
            status="queued",
            agent=accepted.agent,
            sensitivity=accepted.sensitivity,
            provider=accepted.provider,
            prompt_tokens=accepted.prompt_tokens,
            links=links,
        )
        return answer, 202, {"Location": links["self"]}

    @tasks.get("/<request_id>")
    def show(request_id: str) -> Response:
        return jsonify(_task(watcher, _find(watcher, request_id)))

    @tasks.get("/<request_id>/events")
    def events(request_id: str) -> Response:
        row = _find(watcher, request_id)
        cursor = Cursor.parse(request.headers.get("Last-Event-ID") or request.args.get("cursor"))
        frames = watcher.frames(row, cursor)
        if frames == []:
            # 204 tells an EventSource that there is nothing to reconnect for.
            return Response(status=204)
        return Response(
            _server_sent_events(frames),
            content_type="text/event-stream; charset=utf-8",
            headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"},
        )

    return tasks


def _find(watcher: Watcher, request_id: str) -> Row[Any]:
    if not is_request_id(request_id):
        raise NotFound("there is no such task")
    return watcher.find(request_id, g.caller.organization)


def _body() -> bytes:
    """Return the request's body. Raises UnsupportedMediaType, BodyTooLarge, InvalidJson."""
    if request.mimetype != "application/json":
        raise UnsupportedMediaType
    try:
        return request.get_data(cache=False)
    except RequestEntityTooLarge:
        _drain()
        raise BodyTooLarge(f"the body is larger than {request.max_content_length} bytes") from None
    except ClientDisconnected:
        raise InvalidJson("the connection ended before the body did") from None


def _drain() -> None:
    stream, left = request.environ["wsgi.input"], _DRAIN_BYTES
    while left > 0 and (chunk := stream.read(min(left, 2**16))):
        left -= len(chunk)


def _links(request_id: str) -> dict[str, str]:
    return {
        "self": url_for("tasks.show", request_id=request_id),
        "events": url_for("tasks.events", request_id=request_id),
    }


def _task(watcher: Watcher, row: Row[Any]) -> dict[str, Any]:
    task: dict[str, Any] = {
        "id": row.request_id,
        "status": row.state,
        "agent": row.agent_name,
        "attempt": row.attempt,
        "created_at": row.created_at.isoformat(),
        "finished_at": row.finished_at.isoformat() if row.finished_at else None,
        "links": _links(row.request_id),
    }
    result = watcher.result(row)
    if result is not None:
        task["result"] = result.model_dump(exclude={"cuts"})
    if row.error_code is not None:
        kind = by_code(row.error_code)
        task["error"] = {
            "code": row.error_code,
            "message": kind.title(),
            "hint": kind.hint,
            "retryable": kind.retryable,
        }
    return task


def _server_sent_events(frames: Iterable[Frame | None]) -> Iterator[bytes]:
    # A first line at once, so that the client has its headers before the first token.
    yield b": watching\n\n"
    for frame in frames:
        yield _sse(frame)


def _sse(frame: Frame | None) -> bytes:
    if frame is None:
        return b": still working\n\n"
    data = json.dumps(frame.data, ensure_ascii=False, separators=(",", ":"))
    return f"id: {frame.cursor}\nevent: {frame.event}\ndata: {data}\n\n".encode()
