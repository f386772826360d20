"""The body of a response: what is refused and how, and the conversation that its items are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway_app.openai.response_body import NOT_OFFERED, ResponseBody
from gateway_app.openai.response_input import input_items
from tasks.errors import InvalidRequest, Unsupported
from tasks.job import TaskRequest

MODEL = "served"
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}


def request(content: dict[str, Any], earlier: list[dict[str, Any]] | None = None) -> TaskRequest:
    """Return the request that a body is."""
    body = ResponseBody.read({"model": MODEL, "input": "Hi"} | content)
    return body.request([], MODEL, "hermes", lambda _: earlier or [])


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_what_is_not_offered(name: str) -> None:
    """A parameter of OpenAI's that there is nothing for is refused by name; empty, it asks for nothing."""
    wanted: tuple[Any, ...] = ("x", {"a": 1}, ["x"], 3, True)
    for value in wanted:
        with pytest.raises(Unsupported) as raised:
            request({name: value})
        assert raised.value.extensions["param"] == name
    nothing: tuple[Any, ...] = (None, [], {})
    for value in nothing:
        assert request({name: value}) == request({})


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"input": [{"type": "reasoning", "id": "r", "summary": []}]}, "input"),
        ({"input": [{"type": [], "id": "r"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input"),
        ({"input": [{**CALL, "type": "function_call_output", "output": [{"type": "input_image"}]}]}, "input"),
        ({"truncation": "auto"}, "truncation"),
        (
            {"tools": [{"type": "function", "name": "f"}], "text": {"format": {"type": "json_object"}}},
            "text.format",
        ),
    ],
)
def test_what_this_gateway_cannot_do(content: dict[str, Any], param: str) -> None:
    """It says which parameter asks for it."""
    with pytest.raises(Unsupported) as raised:
        request(content)
    assert raised.value.extensions["param"] == param


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"input": None}, "input"),
        ({"input": [5]}, "input.0"),
        ({"input": [{"role": "user"}]}, "input.0.message.content"),
        ({"input": [{**CALL, "call_id": ""}]}, "input.0.function_call.call_id"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": ["f"]}, "tools.0"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.json_schema.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"background": 1}, "background"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_wrong(content: dict[str, Any], field: str) -> None:
    """It names the field, and repeats nothing of what was sent."""
    with pytest.raises(InvalidRequest) as raised:
        request(content)
    assert raised.value.extensions["errors"][0]["field"] == field


def test_items_are_the_messages_of_a_chat() -> None:
    """Calls belong to the assistant's message before them; an output needs its call."""
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "One"}, {"type": "input_text", "text": "two"}]},
        {"role": "assistant", "content": "Let me look."},
        CALL,
        {**CALL, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "1"}]},
        {**CALL, "call_id": "c3"},
    ]
    made = request({"input": items, "instructions": "You are a pirate."})
    assert [message["role"] for message in made.messages] == [
        *("system", "system", "user", "assistant", "tool", "tool", "assistant")
    ]
    assert made.messages[2]["content"] == "One\ntwo"
    assert [call["id"] for call in made.messages[3]["tool_calls"]] == ["c1", "c2"]
    assert made.messages[4] == {"role": "tool", "content": "2", "tool_call_id": "c2"}
    shown = input_items("gw_0", made.messages[1:])
    assert [item["type"] for item in shown] == [
        *("message", "message", "message", "function_call", "function_call"),
        *("function_call_output", "function_call_output", "function_call"),
    ]
    assert len({item["id"] for item in shown}) == len(shown)
    assert request({"input": [dict(item) for item in shown]}).messages == made.messages[1:]
    with pytest.raises(InvalidRequest):
        request({"input": [{"type": "function_call_output", "call_id": "c9", "output": ""}]})


def test_an_earlier_conversation_is_not_changed() -> None:
    """It comes after the instructions and before the new items, to which its calls are known."""
    earlier: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    before = json.dumps(earlier)
    made = request({"previous_response_id": "gw_1", "instructions": "New.", "input": [CALL]}, earlier)
    assert [message["role"] for message in made.messages] == ["system", "user", "assistant"]
    assert made.messages[2]["tool_calls"][0]["id"] == "c1"
    assert json.dumps(earlier) == before


def test_what_is_asked_is_kept_to_be_shown() -> None:
    """As it was sent, nulls of a schema too, but for the input, which the messages hold."""
    schema = {"type": "object", "properties": {"a": {"default": None}}}
    text = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
    made = request({"text": text, "user": "u", "metadata": {"team": "blue"}, "service_tier": "flex"})
    assert made.asked == {"model": MODEL, "text": text, "user": "u", "metadata": {"team": "blue"}}
    assert made.metadata == {"team": "blue", "user": "u"}
    assert (made.priority, made.agent, made.api) == ("low", None, "responses")
    assert TaskRequest.model_validate_json(made.model_dump_json(exclude_defaults=True)) == made


def test_the_schema_of_the_body() -> None:
    """It shows that the input may be text."""
    kinds = ResponseBody.model_json_schema()["properties"]["input"]["anyOf"]
    assert [kind["type"] for kind in kinds] == ["string", "array"]
