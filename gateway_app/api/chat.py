"""`/v1/chat/completions`, as OpenAI's clients expect it."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, g, jsonify, request
from sqlalchemy.engine import Row

from gateway_app.api import reading
from gateway_app.governance.api_keys import ApiKeys
from gateway_app.openai import completions
from gateway_app.openai.chat_body import ChatBody
from gateway_app.openai.governance import TIER_OF
from gateway_app.pipeline import Pipeline
from gateway_app.streaming import presence
from gateway_app.streaming.pump import Make
from gateway_app.synchronous import Synchronous
from tasks.job import TaskRequest


def blueprint(keys: ApiKeys, pipeline: Pipeline, synchronous: Synchronous, tool_parser: str | None) -> Blueprint:
    """Return the routes, over what they need."""
    chat = Blueprint("chat", __name__, url_prefix="/v1")

    reading.require_key(chat, keys)

    @chat.post("/chat/completions")
    def complete() -> Response:
        content, key = reading.submission(pipeline)
        asked: list[ChatBody] = []

        def read() -> TaskRequest:
            asked.append(reading.validate(ChatBody, reading.parse(content)))
            return asked[0].request(request.headers.items(), pipeline.model_name, tool_parser)

        accepted = pipeline.submit(g.caller, read, pipeline.idempotency(key, content))
        body = asked[0]
        row = accepted.row
        if body.stream:
            response = synchronous.stream(row, _chunks(body, row))
        else:
            result = synchronous.result(row, presence.watch(request.environ))
            response = jsonify(completions.completion(head(row, body.model), result))
        response.headers["X-Request-Id"] = accepted.request_id
        if accepted.repeated:
            response.headers["Idempotent-Replayed"] = "true"
        return response

    return chat


def _chunks(body: ChatBody, row: Row[Any]) -> Make:
    usage = body.stream_options is not None and body.stream_options.include_usage
    return lambda frames: completions.chunks(head(row, body.model), frames, body.n or 1, usage)


def head(row: Row[Any], model: str) -> dict[str, Any]:
    """Return what every chunk and completion of a request begins with."""
    return {
        "id": row.request_id,
        "created": int(row.created_at.timestamp()),
        "model": model,
        "service_tier": TIER_OF[row.priority],
        "system_fingerprint": None,
    }
