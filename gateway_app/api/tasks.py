"""`/v1/tasks`: submit a task, poll it, watch it, list them, cancel one, ask why it ran where it did."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from flask import Blueprint, Response, g, jsonify, request, url_for
from pydantic import Field
from sqlalchemy.engine import Row

from gateway_app.api import reading, sse
from gateway_app.api.pages import listing
from gateway_app.api.task_body import TaskBody
from gateway_app.governance.api_keys import ApiKeys, Caller
from gateway_app.pipeline import Accepted, Pipeline
from gateway_app.requests.explain import attempts
from gateway_app.streaming.watch import Watcher
from gateway_app.synchronous import Synchronous
from tasks import requests_read
from tasks.errors import InvalidRequest, PolicyVeto, by_code
from tasks.ids import is_request_id
from tasks.job import Frozen, Name, TaskRequest
from tasks.schema import TERMINAL_STATES
from tasks.stream import Cursor, Frame


class TaskQuery(Frozen):
    """Which tasks a list shows, the newest first."""

    status: Literal["queued", "running", "completed", "failed", "cancelled", "expired", "dead"] | None = None
    agent: Name | None = None
    project_id: Name | None = None
    api: Literal["tasks", "chat", "responses"] | None = Field(default=None, description="The API it came through.")
    after: str | None = Field(default=None, description="The last id of the page before.")
    limit: int = Field(default=20, ge=1, le=reading.MAX_PAGE)

    def filters(self) -> dict[str, Any]:
        """Return the columns that are asked for. Raises InvalidRequest if `after` is not an id."""
        if self.after is not None and not is_request_id(self.after):
            raise InvalidRequest("after is not the id of a task", errors=[{"field": "after", "message": "no task id"}])
        columns = {"status": "state", "agent": "agent_name", "project_id": "project_id", "api": "api"}
        return {column: getattr(self, name) for name, column in columns.items() if getattr(self, name)}


def blueprint(keys: ApiKeys, pipeline: Pipeline, synchronous: Synchronous) -> Blueprint:
    """Return the routes, over what they need."""
    watcher, canceller = synchronous.watcher, synchronous.canceller
    tasks = Blueprint("tasks", __name__, url_prefix="/v1/tasks")

    reading.require_key(tasks, keys)

    @tasks.post("")
    def submit() -> tuple[Response, int, dict[str, str]]:
        body, key = reading.submission(pipeline)
        accepted = pipeline.submit(g.caller, lambda: read_task(body), pipeline.idempotency(key, body))
        headers = {"Location": url_for("tasks.show", request_id=accepted.request_id)}
        if accepted.repeated:
            headers["Idempotent-Replayed"] = "true"
        return jsonify(accepted_answer(accepted)), 202, headers

    @tasks.get("")
    def index() -> Response:
        wanted = reading.query(TaskQuery)
        filters, organization, limit = wanted.filters(), g.caller.organization, wanted.limit
        rows = watcher.database.read(
            lambda connection: requests_read.page(connection, organization, filters, wanted.after, limit + 1)
        )
        return listing(rows, limit, summary)

    @tasks.get("/<request_id>")
    def show(request_id: str) -> Response:
        return jsonify(task_answer(watcher, find(watcher, request_id)))

    @tasks.get("/<request_id>/schedule")
    def schedule(request_id: str) -> Response:
        row = find(watcher, request_id)
        return jsonify({"data": [each.shown() for each in attempts(watcher.database, request_id, row.organization)]})

    @tasks.delete("/<request_id>")
    def cancel(request_id: str) -> tuple[Response, int]:
        find(watcher, request_id)
        row = canceller.cancel(request_id, g.caller.organization)
        return jsonify(task_answer(watcher, row)), 200 if row.state == "cancelled" else 202

    @tasks.get("/<request_id>/events")
    def events(request_id: str) -> Response:
        row = find(watcher, request_id)
        cursor = Cursor.parse(request.headers.get("Last-Event-ID") or request.args.get("cursor"))
        if row.state in TERMINAL_STATES and watcher.frames(row, cursor) == []:
            # 204 tells an EventSource that there is nothing to reconnect for.
            return Response(status=204)
        return synchronous.watch(row, cursor, _events)

    return tasks


def find(watcher: Watcher, request_id: str) -> Row[Any]:
    """Return the caller's request. Raises NotFound."""
    return watcher.find(request_id, g.caller.organization)


def read_task(content: bytes) -> TaskRequest:
    """Return the request in a body. Raises InvalidJson or InvalidRequest."""
    return reading.validate(TaskBody, reading.parse(content)).request()


def submit_content(pipeline: Pipeline, caller: Caller, content: Any, key: str | None) -> dict[str, Any]:
    """Take in a task that came as part of something else than a body of its own; return what its client is told."""

    def read() -> TaskRequest:
        if not isinstance(content, dict):
            raise InvalidRequest(
                "a task must be a JSON object", errors=[{"field": "task", "message": "must be an object"}]
            )
        return reading.validate(TaskBody, content).request()

    body = json.dumps(content, sort_keys=True).encode()
    return accepted_answer(pipeline.submit(caller, read, pipeline.idempotency(key, body)))


def accepted_answer(accepted: Accepted) -> dict[str, Any]:
    """Return what a client is told whose task was accepted."""
    return {
        "id": accepted.request_id,
        "status": "queued",
        "agent": accepted.task.agent,
        "sensitivity": accepted.sensitivity,
        "provider": accepted.provider,
        "prompt_tokens": accepted.prompt_tokens,
        "links": _links(accepted.request_id),
    }


def summary(row: Row[Any]) -> dict[str, Any]:
    """Return what a list shows of a request."""
    return {
        "id": row.request_id,
        "status": row.state,
        "cancelling": row.cancel_requested_at is not None and row.finished_at is None,
        "api": row.api,
        "agent": row.agent_name,
        "project_id": row.project_id,
        "priority": row.priority,
        "attempt": row.attempt,
        "created_at": row.created_at.isoformat(),
        "deadline": row.deadline.isoformat() if row.deadline else None,
        "finished_at": row.finished_at.isoformat() if row.finished_at else None,
        "links": _links(row.request_id),
    }


def task_answer(watcher: Watcher, row: Row[Any]) -> dict[str, Any]:
    """Return a request as `GET /v1/tasks/{id}` shows it, with its answer if it has one."""
    task = {**summary(row), "metadata": watcher.request(row).metadata}
    result = watcher.result(row)
    if result is not None:
        first, *others = result.choices
        shown: dict[str, Any] = {"text": first.text, "finish_reason": first.finish_reason}
        if others:
            shown["choices"] = [choice.model_dump(mode="json") for choice in result.choices]
        elif first.tool_calls or first.logprobs:
            shown |= first.model_dump(mode="json", include={"tool_calls", "logprobs"})
        task["result"] = {**shown, **result.model_dump(mode="json", include={"model", "usage", "timings"})}
    if row.error_code is not None:
        kind = by_code(row.error_code)
        task["error"] = {
            "code": row.error_code,
            "message": kind.title(),
            "hint": kind.hint,
            "retryable": kind.retryable,
        }
        if issubclass(kind, PolicyVeto):
            # It was refused when it left the queue; the audit event alone holds what its caller was not there to be told.
            veto = watcher.database.read(lambda connection: requests_read.veto_of(connection, row.request_id))
            task["error"] |= {"veto": veto} if veto else {}
    return task


def _links(request_id: str) -> dict[str, str]:
    path = url_for("tasks.show", request_id=request_id)
    return {"self": path, "events": f"{path}/events", "stream": f"{path}/stream"}


def _events(frames: Iterable[Frame | None]) -> Iterator[bytes]:
    # A first line at once, so that the client has its headers before the first token.
    yield b": watching\n\n"
    yield from map(sse.of_frame, frames)
