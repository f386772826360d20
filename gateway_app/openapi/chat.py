"""`/v1/chat/completions` and `/v1/models`: the operations."""

from __future__ import annotations

from typing import Any

from gateway_app.openai.chat_body import ChatBody
from gateway_app.openapi.answers.chat import ChatCompletion, ChatCompletionChunk, Model, ModelList
from gateway_app.openapi.operation import Errors, Link, Operation, Reply, Stream
from gateway_app.openapi.problems import OpenAIError
from gateway_app.openapi.requests import ChatHeaders
from gateway_app.openapi.tasks import SUBMITS
from tasks.errors import (
    AnswerChanged,
    AttemptsExhausted,
    Cancelled,
    EngineDead,
    EngineFailed,
    Expired,
    KeyRevoked,
    ModelMismatch,
    NotFound,
    QueueLost,
    UnknownAgent,
    Unsupported,
)

#: What an operation that waits for the answer can answer with, once it has begun.
WAITS: Errors = (
    *(EngineFailed, EngineDead, ModelMismatch, AttemptsExhausted, QueueLost),
    *(Cancelled, Expired, KeyRevoked),
)

MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "What is on fire?"}], "max_tokens": 16}

OPERATIONS = (
    Operation(
        "post",
        "/v1/chat/completions",
        "createChatCompletion",
        "OpenAI",
        "Continue a conversation",
        {
            200: Reply(
                "The completion; with `stream`, its chunks as unnamed events, then `[DONE]`. An error after the first "
                "chunk is an event with OpenAI's error object.",
                ChatCompletion,
                stream=Stream({"message": (ChatCompletionChunk, OpenAIError)}, last="[DONE]"),
                headers=("X-Request-Id", "Idempotent-Replayed"),
            )
        },
        errors=(*SUBMITS, Unsupported, *WAITS),
        late_errors=(AnswerChanged,),
        description="`model` is an agent, whose profile goes first, or the served model. A parameter that the gateway "
        "does not know is refused: ignoring it would be a lie. If the client goes away, the request is cancelled.",
        body=ChatBody,
        bodies={
            "agent": {"model": "incident-responder", **MESSAGES},
            "streamed": {
                "model": "incident-responder",
                **MESSAGES,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        },
        headers=ChatHeaders,
    ),
    Operation(
        "get",
        "/v1/models",
        "listModels",
        "OpenAI",
        "List the agents and the served model",
        {
            200: Reply(
                "What `model` may be.", ModelList, links=(Link("getModel", {"name": "$response.body#/data/0/id"}),)
            )
        },
    ),
    Operation(
        "get",
        "/v1/models/{name}",
        "getModel",
        "OpenAI",
        "Show an agent or the served model",
        {200: Reply("It is known.", Model)},
        errors=(UnknownAgent, NotFound),
    ),
)
