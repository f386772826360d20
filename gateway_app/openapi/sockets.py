"""The WebSockets. OpenAPI can only describe the request that opens one; what is said on it stands in the text."""

from __future__ import annotations

from gateway_app.openapi.operation import Errors, Operation, Reply
from gateway_app.openapi.requests import EventQuery
from gateway_app.openapi.tasks import SUBMITS
from tasks.errors import (
    AlreadyFinished,
    InvalidCursor,
    InvalidRequest,
    NotFound,
    OriginNotAllowed,
    ServiceUnavailable,
    TooManyWatches,
    UpgradeRequired,
)

OPENS: Errors = (OriginNotAllowed, UpgradeRequired, InvalidRequest, ServiceUnavailable)
OPENED = {101: Reply("The socket is open.", headers=("Upgrade",))}
KEY = (
    "A browser, which cannot send headers on a WebSocket, may send its key as the subprotocol `metaqore.key.KEY` "
    "beside `metaqore.v1`. Closing codes: 1000 after the last frame, 1001 when the gateway stops, 1008 for a key that "
    "was revoked, 1011 for an internal error, 1013 to come back later."
)

OPERATIONS = (
    Operation(
        "get",
        "/v1/tasks/{request_id}/stream",
        "streamTask",
        "sockets",
        "Watch a request on a WebSocket",
        OPENED,
        errors=(*OPENS, NotFound, InvalidCursor),
        description="Each message is a frame: `id` is its cursor, `event` and `data` are as in `watchTask`. The socket "
        f"closes after the last one. {KEY}",
        query=EventQuery,
        websocket=True,
    ),
    Operation(
        "get",
        "/v1/stream",
        "converse",
        "sockets",
        "Submit, watch and cancel any number of tasks on one WebSocket",
        OPENED,
        errors=OPENS,
        late_errors=(*SUBMITS, NotFound, InvalidCursor, AlreadyFinished, TooManyWatches),
        description="Messages are JSON objects with `op`: `submit` (`task`, `idempotency_key`), `watch` (`id`, "
        "`cursor`), `unwatch` (`id`), `cancel` (`id`), `ping`, each with a `ref` of the client's own, which the answer "
        "repeats. Answers have `op` as well: `accepted`, `watching`, `unwatched`, `cancelled`, `pong`, `error`, and "
        f"`frame` with `task`, `id`, `event` and `data`. {KEY}",
        websocket=True,
    ),
)
