"""`/v1/tasks`: the operations of the native task API."""

from __future__ import annotations

from typing import Any

from gateway_app.api.task_body import TaskBody
from gateway_app.api.tasks import TaskQuery
from gateway_app.openapi.answers.tasks import (
    Accepted,
    AttemptBegun,
    DeltaShown,
    Schedule,
    Task,
    TaskCompleted,
    TaskEnded,
    TaskPage,
)
from gateway_app.openapi.operation import READS_JSON, Errors, Link, Operation, Reply, Stream
from gateway_app.openapi.problems import EXAMPLE_ID
from gateway_app.openapi.requests import EventHeaders, EventQuery, IdempotencyHeaders
from tasks.errors import (
    AlreadyFinished,
    DeadlinePassed,
    IdempotencyConflict,
    InvalidCursor,
    InvalidRequest,
    NotFound,
    PolicyVeto,
    ProjectUnverified,
    PromptTooLong,
    QueueFull,
    QueueUnavailable,
    UnknownAgent,
    Unsupported,
)
from tasks.prompts.tokenizer import TemplateRefused

#: What every operation that takes a request for the model in can answer with.
SUBMITS: Errors = (
    *READS_JSON,
    *(
        PolicyVeto,
        ProjectUnverified,
        Unsupported,
        UnknownAgent,
        IdempotencyConflict,
        PromptTooLong,
        DeadlinePassed,
        TemplateRefused,
    ),
    *(QueueFull, QueueUnavailable),
)

STREAM = Stream(
    {
        "started": (AttemptBegun,),
        "reset": (AttemptBegun,),
        "delta": (DeltaShown,),
        "completed": (TaskCompleted,),
        "failed": (TaskEnded,),
        "cancelled": (TaskEnded,),
        "expired": (TaskEnded,),
        "dead": (TaskEnded,),
    },
    cursors=True,
)
BODY: dict[str, Any] = {
    "agent": "incident-responder",
    "directive": "Name the most likely cause in one sentence.",
    "context": {"host": "db-1", "alert": "disk full"},
}
LINKS = tuple(
    Link(operation, {"request_id": "$response.body#/id"}) for operation in ("getTask", "cancelTask", "watchTask")
)
TASK = Reply("The task.", Task)
CANCELLED = Reply("It is cancelled, now or before.", Task)

OPERATIONS = (
    Operation(
        "post",
        "/v1/tasks",
        "submitTask",
        "tasks",
        "Submit a task",
        {
            202: Reply(
                "It is recorded and queued.",
                Accepted,
                headers=("Location", "Idempotent-Replayed"),
                links=LINKS,
                example={
                    "id": EXAMPLE_ID,
                    "status": "queued",
                    "agent": "incident-responder",
                    "sensitivity": "public",
                    "provider": "hmcp_gateway",
                    "prompt_tokens": 667,
                    "links": {
                        "self": f"/v1/tasks/{EXAMPLE_ID}",
                        "events": f"/v1/tasks/{EXAMPLE_ID}/events",
                        "stream": f"/v1/tasks/{EXAMPLE_ID}/stream",
                    },
                },
            )
        },
        errors=SUBMITS,
        description="Governed, recorded and queued before it is answered. `links` say where to poll and watch it.",
        body=TaskBody,
        bodies={"incident": BODY},
        headers=IdempotencyHeaders,
    ),
    Operation(
        "get",
        "/v1/tasks",
        "listTasks",
        "tasks",
        "List requests of all APIs, the newest first",
        {200: Reply("A page of them.", TaskPage)},
        errors=(InvalidRequest,),
        query=TaskQuery,
    ),
    Operation(
        "get",
        "/v1/tasks/{request_id}",
        "getTask",
        "tasks",
        "Show a request, with its answer if it has one",
        {200: TASK},
        errors=(NotFound,),
    ),
    Operation(
        "get",
        "/v1/tasks/{request_id}/schedule",
        "explainTask",
        "tasks",
        "Tell why a request ran where it did",
        {200: Reply("The decision for each of its attempts.", Schedule)},
        errors=(NotFound,),
        description="What else of the organization waited, what each would have cost there, and what was found in the cache.",
    ),
    Operation(
        "delete",
        "/v1/tasks/{request_id}",
        "cancelTask",
        "tasks",
        "Cancel a request, queued or running",
        {200: CANCELLED, 202: Reply("It will be: its worker is told, and has not ended it yet.", Task)},
        errors=(NotFound, AlreadyFinished),
        description="Its record stays, and it can still be read. Cancelling again is no error.",
    ),
    Operation(
        "get",
        "/v1/tasks/{request_id}/events",
        "watchTask",
        "tasks",
        "Watch a request as server-sent events",
        {
            200: Reply("The frames after the cursor, up to the last one, live or replayed.", stream=STREAM),
            204: Reply("The stream has ended, and the cursor is at its end: do not reconnect."),
        },
        errors=(NotFound, InvalidCursor),
        description="An event's `id` is its cursor. A comment comes after each silence, so that dead links are found.",
        query=EventQuery,
        headers=EventHeaders,
    ),
)
