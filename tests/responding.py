"""OpenAI's client asking for responses; every answer is checked by the client's own types."""

from __future__ import annotations

import time
from typing import Any

import openai
import requests
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.fleet import Fleet

AGENT = "incident-responder"
#: How long the simulated engine's answers are; they take two seconds, a token at a time.
TOKENS = 400
TYPED: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def ask(client: openai.OpenAI, **options: Any) -> Response:
    """Return a short response."""
    asked = {"model": AGENT, "input": "What is on fire?", "max_output_tokens": 12, "extra_body": {"seed": 5}}
    create: Any = client.responses.create
    made = create(**asked | options)
    assert isinstance(made, Response)
    Response.model_validate(made.to_dict())
    return made


def stream(client: openai.OpenAI, **options: Any) -> list[Any]:
    """Return the events of the same, each checked against the client's types."""
    asked = {"model": AGENT, "input": "What is on fire?", "max_output_tokens": 12, "extra_body": {"seed": 5}}
    create: Any = client.responses.create
    return checked(create(**asked | {"stream": True} | options))


def checked(events: Any) -> list[Any]:
    """Return events that are all valid by the client's own types."""
    return [TYPED.validate_python(event.to_dict()) for event in events]


def raw(fleet: Fleet, response_id: str, after: int | None = None) -> list[str]:
    """Return a response's events as they are sent."""
    query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    answer = requests.get(f"{fleet.url}/v1/responses/{response_id}", query, headers=fleet.headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return [block for block in answer.content.decode().split("\n\n") if block and not block.startswith(":")]


def finished(client: openai.OpenAI, response: Response) -> Response:
    """Poll a response until it has ended."""
    deadline = time.monotonic() + 30
    while response.status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        response = client.responses.retrieve(response.id)
    return response
