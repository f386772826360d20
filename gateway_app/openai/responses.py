"""The response object: a request as OpenAI's Responses API shows it.

Everything in it comes from the request's row and what is sealed there, so it is the same from every process, and a
finished one is the same for ever. `outset` is what the object was before there was any answer; streams begin with it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Row

from gateway_app.openai.governance import TIER_OF
from tasks.errors import by_code
from tasks.ids import PREFIX
from tasks.job import Piece, Result, TaskRequest, Usage

_STATUS_OF = {"running": "in_progress", "expired": "failed", "dead": "failed"}
#: The key of the answer's text among its parts; a call's is its index.
TEXT = None
Key = int | None


def response(row: Row[Any], task: TaskRequest, result: Result | None) -> dict[str, Any]:
    """Return the response object as it is now, with the answer if there is one."""
    if row.state == "completed" and result is not None:
        return completed(row, task, result)
    status = _STATUS_OF.get(row.state, row.state)
    facts: dict[str, Any] = {"error": _error(row.error_code)} if status == "failed" else {}
    if result is not None:
        facts |= {"output": output(row.request_id, result, status), "usage": usage(result.usage)}
    return {**outset(row, task, status), **facts}


def completed(row: Row[Any], task: TaskRequest, result: Result) -> dict[str, Any]:
    """Return the response object of an answered request; of `row` only what was there from its beginning is read."""
    facts: dict[str, Any]
    if result.finish_reason == "length":
        facts = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    else:
        at = row.created_at.timestamp() + result.timings.total_ms / 1000
        facts = {"status": "completed", "completed_at": int(at)}
    facts |= {"output": output(row.request_id, result, facts["status"]), "usage": usage(result.usage)}
    return {**outset(row, task, facts["status"]), **facts}


def outset(row: Row[Any], task: TaskRequest, status: str) -> dict[str, Any]:
    """Return the response object before there was an answer; nothing in it changes later but what it leaves empty."""
    asked = task.asked
    return {
        "id": row.request_id,
        "object": "response",
        "created_at": int(row.created_at.timestamp()),
        "status": status,
        "background": asked.get("background", False),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": asked.get("metadata", {}),
        "model": asked["model"],
        "output": [],
        "parallel_tool_calls": asked.get("parallel_tool_calls", True),
        "previous_response_id": asked.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "service_tier": TIER_OF[row.priority],
        "store": asked.get("store", True),
        "temperature": asked.get("temperature", 1.0),
        "text": {"format": {"type": "text"}, **asked.get("text", {})},
        "tool_choice": asked.get("tool_choice", "auto"),
        "tools": [{"description": None, "parameters": None, "strict": None, **tool} for tool in asked.get("tools", ())],
        "top_logprobs": 0,
        "top_p": asked.get("top_p", 1.0),
        "truncation": "disabled",
        "usage": None,
        "user": asked.get("user"),
    }


def output(request_id: str, result: Result, status: str) -> list[dict[str, Any]]:
    """Return the answer's items in the order in which the model began them; `status` is the response's.

    Every answer that the model finished has an item, if only a message without text.
    """
    choice = result.choices[0]
    keys = list(dict.fromkeys(key for piece in result.pieces if piece.choice == 0 for key in parts(piece)))
    calls = dict(zip(sorted(key for key in keys if key is not TEXT), choice.tool_calls, strict=True))
    if not keys and status in ("completed", "incomplete"):
        keys = [TEXT]
    ended = "completed" if status == "completed" else "incomplete"
    items = []
    for key in keys:
        if key is TEXT:
            items.append(message(request_id, ended, text_part(choice.text)))
        else:
            call = calls[key]
            items.append(function_call(request_id, key, ended, call.id, call.name, call.arguments))
    return items


def parts(piece: Piece) -> list[Key]:
    """Return which parts of the answer a piece adds to."""
    text: list[Key] = [TEXT] if piece.text else []
    return text + [call.index for call in piece.tool_calls]


def message(request_id: str, status: str, *content: dict[str, Any]) -> dict[str, Any]:
    """Return the message that holds the answer's text."""
    item_id = f"msg_{request_id.removeprefix(PREFIX)}"
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": list(content)}


def text_part(text: str) -> dict[str, Any]:
    """Return the content of the answer's message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def function_call(request_id: str, index: int, status: str, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """Return the item of one call. `call_id` is the engine's, since templates of some models read it."""
    item_id = f"fc_{request_id.removeprefix(PREFIX)}_{index}"
    call = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"id": item_id, "type": "function_call", "status": status, **call}


def usage(used: Usage) -> dict[str, Any]:
    """Return token counts under the names of the Responses API."""
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": used.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used.prompt_tokens + used.output_tokens,
    }


def _error(code: str | None) -> dict[str, Any]:
    """Return the error object. OpenAI's own codes are a closed list, so the stable code is its `type`."""
    kind = by_code(code)
    facts = {"type": kind.code, "param": None, "hint": kind.hint, "retryable": kind.retryable}
    return {"code": "server_error", "message": kind.title(), **facts}
