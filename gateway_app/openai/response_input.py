"""The input of a response: items as OpenAI's clients send them, and the messages that a chat template knows.

A response may continue an earlier one, so the way back is needed too: from the messages of a stored request, and from
its answer. What a chat template calls one assistant message, with text and calls, is several items here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from gateway_app.openai.messages import TextPart, text_of
from tasks.errors import InvalidRequest
from tasks.ids import PREFIX
from tasks.job import Frozen, Result

Status = Literal["in_progress", "completed", "incomplete"]


class InputMessage(Frozen):
    """One turn of a conversation. `developer` is OpenAI's newer name for `system`."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: str | list[TextPart]
    # What a client sends back of an earlier answer.
    id: str | None = None
    status: Status | None = None
    phase: None = None


class FunctionCall(Frozen):
    """A call the model asked for earlier; `arguments` is JSON text."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionCallOutput(Frozen):
    """What the called function returned."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: str | list[TextPart]
    id: str | None = None
    status: Status | None = None


def _kind(item: Any) -> str | None:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


def _listed(value: Any) -> Any:
    """Return text as the one message that it stands for."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(
        _kind, custom_error_type="item", custom_error_message="must be a message, function_call or function_call_output"
    ),
]
Input = Annotated[
    list[InputItem],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=Annotated[str, Field(min_length=1)] | list[InputItem]),
]
#: The items that a model of text and functions has any use for.
ITEM_KINDS = ("message", "function_call", "function_call_output")


def conversation(earlier: Iterable[Mapping[str, Any]], items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Return the messages of a conversation, `items` following those of `earlier`.

    Raises InvalidRequest if the output of a function is there and the call of it is not.
    """
    messages = [dict(message) for message in earlier]
    called = {call["id"] for message in messages for call in message.get("tool_calls", ())}
    for item in items:
        if isinstance(item, InputMessage):
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": text_of(item.content)})
        elif isinstance(item, FunctionCall):
            called.add(item.call_id)
            _add_call(messages, item.call_id, item.name, item.arguments)
        else:
            if item.call_id not in called:
                raise InvalidRequest("a function_call_output has the call_id of no call before it", param="input")
            messages.append({"role": "tool", "content": text_of(item.output), "tool_call_id": item.call_id})
    return messages


def answered(messages: Iterable[Mapping[str, Any]], result: Result) -> list[dict[str, Any]]:
    """Return a conversation with the answer to it."""
    choice = result.choices[0]
    longer = [*map(dict, messages), {"role": "assistant", "content": choice.text}]
    for call in choice.tool_calls:
        _add_call(longer, call.id, call.name, call.arguments)
    return longer


def input_items(request_id: str, messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a conversation's messages as items, in order; their ids are made of the request's and their place."""
    items: list[dict[str, Any]] = []
    unique = request_id.removeprefix(PREFIX)
    for place, message in enumerate(messages):
        role, text, calls = message["role"], message["content"], message.get("tool_calls", ())
        if role == "tool":
            output = {"call_id": message["tool_call_id"], "output": text}
            items.append({"id": f"fco_{unique}_{place}", "type": "function_call_output", **output})
        elif text or not calls:
            part: dict[str, Any] = {"type": "input_text", "text": text}
            if role == "assistant":
                part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
            items.append({"id": f"msg_{unique}_{place}", "type": "message", "role": role, "content": [part]})
        for index, call in enumerate(calls):
            function = {"call_id": call["id"], **call["function"]}
            items.append({"id": f"fc_{unique}_{place}_{index}", "type": "function_call", **function})
    return [{**item, "status": "completed"} for item in items]


def _add_call(messages: list[dict[str, Any]], call_id: str, name: str, arguments: str) -> None:
    """Add a call to the assistant's last message, or a message to hold it."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    last = messages[-1]
    messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), call]}
