"""`/v1/responses`: the operations."""

from __future__ import annotations

from pydantic import BaseModel

from gateway_app.api.responses import ItemsQuery, RetrieveQuery
from gateway_app.openai.response_body import ResponseBody
from gateway_app.openapi.answers.responses import (
    ArgumentsEvent,
    ErrorEvent,
    InputItems,
    ItemEvent,
    PartEvent,
    Response,
    ResponseEvent,
    TextEvent,
)
from gateway_app.openapi.chat import WAITS
from gateway_app.openapi.operation import Link, Operation, Reply, Stream
from gateway_app.openapi.requests import ChatHeaders
from gateway_app.openapi.tasks import SUBMITS
from tasks.errors import (
    AlreadyFinished,
    AnswerChanged,
    InvalidCursor,
    InvalidRequest,
    NotCompleted,
    NotFound,
    Unsupported,
)

_EVENTS: dict[type[BaseModel], tuple[str, ...]] = {
    ResponseEvent: ("created", "queued", "in_progress", "completed", "incomplete", "failed"),
    ItemEvent: ("output_item.added", "output_item.done"),
    PartEvent: ("content_part.added", "content_part.done"),
    TextEvent: ("output_text.delta", "output_text.done"),
    ArgumentsEvent: ("function_call_arguments.delta", "function_call_arguments.done"),
}
STREAM = Stream(
    {f"response.{name}": (model,) for model, names in _EVENTS.items() for name in names} | {"error": (ErrorEvent,)}
)
HAS_ID = {"response_id": "$response.body#/id"}
LINKS = tuple(Link(name, HAS_ID) for name in ("getResponse", "cancelResponse", "listInputItems"))
BODY = {"model": "incident-responder", "input": "What is on fire?", "max_output_tokens": 16}

OPERATIONS = (
    Operation(
        "post",
        "/v1/responses",
        "createResponse",
        "OpenAI",
        "Make a response",
        {
            200: Reply(
                "The response; with `stream`, its events.",
                Response,
                stream=STREAM,
                headers=("X-Request-Id", "Idempotent-Replayed"),
                links=LINKS,
            )
        },
        errors=(*SUBMITS, Unsupported, NotFound, NotCompleted, *WAITS),
        late_errors=(AnswerChanged,),
        description="Waited for, unless `background` is true: then it is answered at once, and no client's going away "
        "cancels it.",
        body=ResponseBody,
        bodies={
            "text": BODY,
            "background": {**BODY, "background": True},
            "streamed": {**BODY, "stream": True},
        },
        headers=ChatHeaders,
    ),
    Operation(
        "get",
        "/v1/responses/{response_id}",
        "getResponse",
        "OpenAI",
        "Show a response, or its events from a number on",
        {200: Reply("The response as it is now; with `stream`, its events.", Response, stream=STREAM)},
        errors=(NotFound, InvalidRequest, Unsupported, InvalidCursor, AnswerChanged),
        query=RetrieveQuery,
    ),
    Operation(
        "post",
        "/v1/responses/{response_id}/cancel",
        "cancelResponse",
        "OpenAI",
        "Cancel a response",
        {200: Reply("The response as it is now.", Response)},
        errors=(NotFound, AlreadyFinished),
        description="Cancelling again is no error. The record stays.",
    ),
    Operation(
        "get",
        "/v1/responses/{response_id}/input_items",
        "listInputItems",
        "OpenAI",
        "List what a response answers",
        {200: Reply("A page of items.", InputItems)},
        errors=(NotFound, InvalidRequest),
        query=ItemsQuery,
    ),
)
