"""`/v1/batches`, as OpenAI's clients expect it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from flask import Blueprint, Response, g, jsonify
from pydantic import Field, StringConstraints
from sqlalchemy.engine import Row

from gateway_app.api import reading
from gateway_app.api.pages import page
from gateway_app.batches import ids
from gateway_app.batches.batches import Batches
from gateway_app.batches.driver import Driver
from gateway_app.governance.api_keys import ApiKeys
from tasks.job import Frozen

#: The statuses that a batch ends in, each with its own instant.
_ENDED = ("completed", "failed", "expired", "cancelled")


class OutputExpiry(Frozen):
    """How long the output and the error file are kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=30 * 24 * 3600)


class BatchBody(Frozen):
    """What a batch is made of."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: (
        dict[
            Annotated[str, StringConstraints(min_length=1, max_length=64)],
            Annotated[str, StringConstraints(max_length=512)],
        ]
        | None
    ) = Field(default=None, max_length=16)
    output_expires_after: OutputExpiry | None = None


class BatchQuery(Frozen):
    """Which page of the batches a list shows, the newest first."""

    after: str | None = Field(default=None, pattern=ids.PATTERN, description="The last id of the page before.")
    limit: int = Field(default=20, ge=1, le=reading.MAX_PAGE)


def blueprint(keys: ApiKeys, batches: Batches, driver: Driver) -> Blueprint:
    """Return the routes, over what they need. The driver starts with the first request to any route of the app."""
    routes = Blueprint("batches", __name__, url_prefix="/v1/batches")
    routes.before_app_request(driver.start)

    reading.require_key(routes, keys)

    @routes.post("")
    def create() -> Response:
        body = reading.document(BatchBody)
        expiry = body.output_expires_after
        row = batches.create(
            g.caller, body.endpoint, body.input_file_id, body.metadata, expiry.seconds if expiry else None
        )
        driver.wake()
        return jsonify(_shown(row))

    @routes.get("")
    def index() -> Response:
        wanted = reading.query(BatchQuery)
        found = batches.page(g.caller.organization, wanted.after, wanted.limit + 1)
        return page([_shown(row) for row in found], wanted.limit)

    @routes.get("/<batch_id>")
    def show(batch_id: str) -> Response:
        return jsonify(_shown(batches.find(batch_id, g.caller.organization)))

    @routes.post("/<batch_id>/cancel")
    def cancel(batch_id: str) -> Response:
        row = batches.cancel(batch_id, g.caller.organization)
        driver.wake()
        return jsonify(_shown(row))

    def _shown(row: Row[Any]) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        return {
            "id": row.batch_id,
            "object": "batch",
            "endpoint": row.endpoint,
            "errors": {"object": "list", "data": row.errors} if row.errors else None,
            "input_file_id": row.input_file_id,
            "completion_window": "24h",
            "status": row.status,
            "output_file_id": row.output_file_id,
            "error_file_id": row.error_file_id,
            "created_at": _seconds(row.created_at),
            "in_progress_at": _seconds(row.in_progress_at),
            "expires_at": _seconds(row.expires_at),
            "finalizing_at": _seconds(row.finalizing_at),
            "cancelling_at": _seconds(row.cancelling_at),
            **{f"{status}_at": _seconds(row.ended_at) if row.status == status else None for status in _ENDED},
            "request_counts": {"total": row.total, "completed": row.completed, "failed": row.failed},
            "usage": row.usage,
            "metadata": batches.metadata(row),
        }

    return routes


def _seconds(instant: datetime | None) -> int | None:
    return None if instant is None else int(instant.timestamp())
