"""Which texts of a request are scanned, through each API's own body."""

from __future__ import annotations

from typing import Any

from gateway_app.api.task_body import TaskBody
from gateway_app.detection import Detector, texts_of
from gateway_app.openai.chat_body import ChatBody
from tasks.job import ResponseFormat, Sampling, TaskRequest, ToolUse

DETECTOR = Detector()


def counts(task: TaskRequest) -> dict[str, int]:
    """Return what is found in a request."""
    return dict(DETECTOR.scan(texts_of(task)).counts)


def task(**fields: Any) -> TaskRequest:
    """Return what `POST /v1/tasks` makes of a body."""
    return TaskBody.model_validate({"agent": "a", "directive": "Look.", **fields}).request()


def test_a_directive_and_a_context_of_text() -> None:
    """Both are in the user's message."""
    assert counts(task(directive="Ask bob@acme.io.", context="Card 4111 1111 1111 1111")) == {
        "email": 1,
        "credit_card": 1,
    }


def test_names_of_keys_in_a_context_say_what_their_values_are() -> None:
    """Nested, in lists, and beside text that is spelled with escapes."""
    assert counts(task(context={"db": [{"user": "app", "password": "hunter2"}]})) == {"named_secret": 1}
    assert counts(task(context={"person": {"ssn": 536904399, "phone": "2125552368"}})) == {"us_ssn": 1, "phone": 1}
    assert counts(task(context={"log": 'say "hi"\nbob@acme.io\n\tDE89370400440532013000'})) == {"email": 1, "iban": 1}
    assert counts(task(context={"bob@acme.io": 1})) == {"email": 1}


def test_a_secret_in_json_in_a_context() -> None:
    """A tool's answer is often JSON in a string."""
    assert counts(task(context={"body": '{"password": "hunter2"}'})) == {"named_secret": 1}


def test_every_message_and_call_of_a_conversation() -> None:
    """System, user, assistant, its calls, and the tools' answers."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"iban": "DE89370400440532013000"}'}}
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "You serve bob@acme.io."},
            {"role": "user", "content": [{"type": "text", "text": "password=hunter2"}]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "4111111111111111"},
        ],
    }
    request = ChatBody.model_validate(body).request([], "m", None)
    assert counts(request) == {"email": 1, "named_secret": 1, "iban": 1, "credit_card": 1}


def test_definitions_of_tools_and_answers() -> None:
    """The model reads the one, and its grammar is made of the other."""
    tool = {"type": "function", "function": {"name": "f", "description": "Mails bob@acme.io.", "parameters": {}}}
    schema = ResponseFormat(type="json_schema", json_schema={"const": "4111111111111111"})
    request = TaskRequest(
        messages=({"role": "user", "content": "x"},),
        tools=ToolUse(tools=(tool,)),
        sampling=Sampling(response_format=schema),
    )
    assert counts(request) == {"email": 1, "credit_card": 1}


def test_metadata_is_not_scanned() -> None:
    """No model sees it."""
    assert counts(task(metadata={"owner": "bob@acme.io"})) == {}
