"""Chat completions as OpenAI's clients read them: whole, and in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gateway_app.api import sse
from gateway_app.openai.errors import error_object
from gateway_app.openai.steady import steady
from tasks.errors import GatewayError, by_code
from tasks.job import Choice, Piece, Result, TokenLogprob, ToolCallDelta, Usage
from tasks.stream import Frame

DONE = b"data: [DONE]\n\n"


def completion(head: dict[str, Any], result: Result) -> dict[str, Any]:
    """Return a whole chat completion. `head` holds id, created, model and service tier."""
    choices = [_choice(index, choice) for index, choice in enumerate(result.choices)]
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage(result.usage)}


def chunks(head: dict[str, Any], frames: Iterable[Frame | None], count: int, include_usage: bool) -> Iterator[bytes]:
    """Yield the events of a streamed completion with `count` choices, a comment where `frames` has a silence."""
    head = {**head, "object": "chat.completion.chunk"}
    if include_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return sse.event({**head, "choices": [choice]})

    for index in range(count):
        yield chunk(index, {"role": "assistant", "content": ""})
    try:
        for item in steady(frames):
            if item is None:
                yield sse.HEARTBEAT
            elif isinstance(item, Piece):
                yield chunk(item.choice, _delta(item), logprobs=_logprobs(item.logprobs))
            else:
                for index, reason in enumerate(finish_reasons(item)):
                    yield chunk(index, {}, reason)
                if include_usage:
                    used = usage(Usage.model_validate(item.data["usage"]))
                    yield sse.event({**head, "choices": [], "usage": used})
                yield DONE
    except GatewayError as error:
        error.request_id = error.request_id or head["id"]
        yield sse.event(error_object(error))


def finish_reasons(terminal: Frame) -> list[str]:
    """Return how each choice ended. Raises the error that the request ended with, if it has no answer."""
    if terminal.event != "completed":
        raise by_code(terminal.data["code"])
    return terminal.data.get("finish_reasons") or [terminal.data["finish_reason"]]


def usage(used: Usage) -> dict[str, Any]:
    """Return token counts under OpenAI's names."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.output_tokens,
        "total_tokens": used.prompt_tokens + used.output_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }


def _choice(index: int, choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs),
        "finish_reason": choice.finish_reason,
    }


def _delta(piece: Piece) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if piece.text:
        delta["content"] = piece.text
    if piece.tool_calls:
        delta["tool_calls"] = [_call_delta(call) for call in piece.tool_calls]
    return delta


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, **function}}


def _logprobs(logprobs: tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
    if not logprobs:
        return None
    content = [
        {**_token(token.token, token.logprob), "top_logprobs": [_token(*top) for top in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
