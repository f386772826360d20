"""Answers that the simulated engine cannot give: calls of functions, JSON, and what is left after a loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tasks.db import Database
from tasks.errors import DatabaseUnavailable
from tasks.job import Piece, ToolCallDelta
from tasks.stream import replay
from tests.fleet import own_services
from tests.serving import Served, serve
from tests.stand_in import StandIn, result
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_model

AGENT = "incident-responder"
TYPED: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "disk_usage",
        "description": "How full a disk is.",
        "parameters": {"type": "object", "properties": {"host": {"type": "string"}}, "additionalProperties": False},
        "strict": True,
    }
]
TEXT = (Piece(text="One "), Piece(text="two "), Piece(text="three "), Piece(text="four."))


@dataclass(frozen=True)
class Gateway:
    """A gateway without workers, what stands in for one, and what a client needs."""

    served: Served
    worker: StandIn


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Return a gateway whose model calls functions, shared by this module's tests."""
    folder = tmp_path_factory.mktemp("gateway")
    variables = {"ENGINE__TOOL_PARSER": "hermes", "STREAMING__HEARTBEAT_S": "0.2"}
    with (
        own_services(folder, model_with_tools(folder / "model"), **variables),
        serve() as served,
        closing(StandIn()) as worker,
    ):
        yield Gateway(served, worker)


def model_with_tools(folder: Path) -> Path:
    """Return the tiny checkpoint with a template that shows tools and calls of them."""
    make_tiny_model(folder)
    calls = "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '') +"
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE.replace("message['content'] +", calls)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"chat_template": template}), "utf-8")
    return folder


@pytest.fixture
def worker(gateway: Gateway) -> StandIn:
    """Return what stands in for a worker."""
    return gateway.worker


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    """Return the client as a team would make it."""
    served = gateway.served
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0, timeout=30) as made:
        yield made


def begun(client: openai.OpenAI, **options: Any) -> str:
    """Make a response in the background; return its id."""
    create: Any = client.responses.create
    made = create(**{"model": AGENT, "input": "How full is it?", "background": True} | options)
    assert isinstance(made, Response)
    assert made.status == "queued"
    return made.id


def events(client: openai.OpenAI, response_id: str, after: int | None = None) -> list[Any]:
    """Return a response's events, each valid by the client's own types."""
    options = {} if after is None else {"starting_after": after}
    retrieve: Any = client.responses.retrieve
    made = retrieve(response_id, stream=True, **options)
    return [TYPED.validate_python(event.to_dict()) for event in made]


def test_calls_of_functions(client: openai.OpenAI, worker: StandIn) -> None:
    """Asked for, shown, answered, and part of the conversation from then on, by id or sent again."""
    calling = result(
        Piece(text="Let me look."),
        Piece(tool_calls=(ToolCallDelta(index=0, id="call-7", name="disk_usage", arguments='{"host":'),)),
        Piece(tool_calls=(ToolCallDelta(index=0, arguments='"db-1"}'),)),
        reason="tool_calls",
    )
    question: list[Any] = [{"role": "user", "content": "How full is it?"}]
    with worker.answering(calling) as taken:
        made = client.responses.create(model=AGENT, input=question, tools=TOOLS, instructions="Look first.")
    Response.model_validate(made.to_dict())
    assert (made.status, made.tools[0].to_dict(), made.tool_choice) == ("completed", TOOLS[0], "auto")
    message, call = made.output
    assert call.type == "function_call"
    assert (call.call_id, call.name, json.loads(call.arguments)) == ("call-7", "disk_usage", {"host": "db-1"})
    first = worker.payload(taken[0])
    assert first.tools is not None
    assert first.tools.tools[0]["function"]["name"] == "disk_usage"
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": '{"used": 0.97}'}
    by_id = begun(client, input=[output], tools=TOOLS, previous_response_id=made.id)
    again = begun(client, input=[*question, message, call, output], tools=TOOLS)
    messages = worker.payload(by_id).messages
    assert (
        messages
        == worker.payload(again).messages
        == (
            {"role": "user", "content": "How full is it?"},
            {
                "role": "assistant",
                "content": "Let me look.",
                "tool_calls": [
                    {
                        "id": "call-7",
                        "type": "function",
                        "function": {"name": "disk_usage", "arguments": '{"host":"db-1"}'},
                    }
                ],
            },
            {"role": "tool", "content": '{"used": 0.97}', "tool_call_id": "call-7"},
        )
    )
    items = client.responses.input_items.list(by_id, order="asc").data
    assert [item.type for item in items] == ["message", "message", "function_call", "function_call_output"]
    worker.run(by_id, result(Piece(text="It is full.")))
    assert client.responses.retrieve(by_id).output_text == "It is full."
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        begun(client, input=[output | {"call_id": "call-8"}], previous_response_id=made.id)
    assert raised.value.param == "input"


def test_a_choice_of_tool(client: openai.OpenAI, worker: StandIn) -> None:
    """It reaches the engine, and is shown as it was sent."""
    choice: Any = {"type": "function", "name": "disk_usage"}
    made = begun(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    tools = worker.payload(made).tools
    assert tools is not None
    assert (tools.choice, tools.parallel) == ("function:disk_usage", False)
    shown = client.responses.retrieve(made)
    assert not isinstance(shown.tool_choice, str)
    assert (shown.tool_choice.to_dict(), shown.parallel_tool_calls) == (choice, False)
    assert worker.payload(begun(client, tools=TOOLS, tool_choice="none")).tools is None
    for refused in ({"tool_choice": choice}, {"tools": TOOLS, "text": {"format": {"type": "json_object"}}}):
        with pytest.raises(openai.UnprocessableEntityError):
            begun(client, **refused)


class Cause(BaseModel):
    """What a caller wants to know."""

    host: str
    certain: bool


def test_parsing_into_a_model(client: openai.OpenAI, worker: StandIn) -> None:
    """`responses.parse` asks for JSON of the model's schema, and gets it back as that model."""
    with worker.answering(result(Piece(text='{"host": "db-1", '), Piece(text='"certain": true}'))) as taken:
        made = client.responses.parse(model=AGENT, input="What is the cause?", text_format=Cause)
    assert made.output_parsed == Cause(host="db-1", certain=True)
    wanted = worker.payload(taken[0]).sampling.response_format
    assert wanted is not None
    assert wanted.json_schema is not None
    assert wanted.json_schema["properties"].keys() == {"host", "certain"}
    assert made.text is not None
    assert made.text.format is not None
    assert made.text.format.type == "json_schema"
    assert worker.payload(begun(client, text={"format": {"type": "json_object"}})).sampling.response_format is not None
    assert worker.payload(begun(client, text={"format": {"type": "text"}})).sampling.response_format is None


def test_a_lost_worker(client: openai.OpenAI, worker: StandIn) -> None:
    """Another one says the same, divided otherwise: a reader of both sees one answer, and may go on anywhere."""
    made = begun(client)
    answer = result(Piece(text="One two th"), Piece(text="ree "), Piece(text="four."))
    worker.start(made)
    worker.send(made, *list(replay(1, result(*TEXT)))[:3])
    worker.run(made, answer)
    whole = events(client, made)
    deltas = [event.delta for event in whole if event.type == "response.output_text.delta"]
    assert "".join(deltas) == answer.text
    assert deltas[:2] == ["One ", "two "]
    for after in range(len(whole)):
        assert events(client, made, after) == whole[after + 1 :]
    worker.redis.flushall()
    assert events(client, made)[-1].response == whole[-1].response
    with pytest.raises(openai.BadRequestError) as raised:
        events(client, made, 7)
    assert raised.value.code == "invalid_cursor"


def test_a_lost_worker_whose_answer_changed(client: openai.OpenAI, worker: StandIn) -> None:
    """Who had read the first answer is told in the stream; who reads now is given the one that holds."""
    made = begun(client)
    stream = client.responses.retrieve(made, stream=True)
    worker.start(made)
    worker.send(made, *list(replay(1, result(*TEXT)))[:3])
    read = []
    for event in stream:
        read.append(event)
        if event.type == "response.output_text.delta" and event.delta == "two ":
            break
    worker.run(made, result(Piece(text="Another answer.")))
    *_, last = stream
    assert last.type == "error"
    assert (last.code, last.sequence_number) == ("answer_changed", read[-1].sequence_number)
    TYPED.validate_python(last.to_dict())
    assert client.responses.retrieve(made).output_text == "Another answer."
    assert events(client, made)[-1].response.output_text == "Another answer."
    with pytest.raises(openai.InternalServerError) as raised:
        events(client, made, read[-1].sequence_number)
    assert raised.value.code == "answer_changed"


@pytest.mark.parametrize("after", [None, 5])
def test_redis_that_lost_the_beginning(client: openai.OpenAI, worker: StandIn, after: int | None) -> None:
    """A reader waits for what is missing instead of going on without it, and gets it from SQL."""
    made = begun(client)
    frames = list(replay(1, result(*TEXT)))
    attempt = worker.start(made)
    worker.send(made, *frames[:3])
    worker.redis.flushall()
    worker.send(made, *frames[3:5])
    options = {} if after is None else {"starting_after": after}
    retrieve: Any = client.responses.retrieve
    stream = retrieve(made, stream=True, **options)
    worker.record(attempt, result(*TEXT))
    worker.send(made, *frames[5:])
    read = [TYPED.validate_python(event.to_dict()) for event in stream]
    worker.redis.flushall()
    assert read == events(client, made, after)
    assert read[-1].response.output_text == "One two three four."


def test_a_database_that_is_away_for_a_moment(
    client: openai.OpenAI, worker: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream ends with an error whose number is the last event's: whoever goes on after it misses nothing."""
    made = begun(client)
    stream = client.responses.retrieve(made, stream=True)
    attempt = worker.start(made)
    worker.send(made, *list(replay(1, result(*TEXT)))[:-1])
    read = []
    for event in stream:
        read.append(TYPED.validate_python(event.to_dict()))
        if event.type == "response.output_text.delta" and event.delta == "four.":
            break

    def away(*_args: Any) -> None:
        raise DatabaseUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(Database, "read", away)
        patch.setattr(Database, "row", away)
        worker.fail(attempt, "engine_failed")
        *_, error = stream
    assert error.type == "error"
    assert (error.code, error.sequence_number) == ("database_unavailable", read[-1].sequence_number)
    assert read + events(client, made, error.sequence_number) == events(client, made)


def test_a_failure(client: openai.OpenAI, worker: StandIn) -> None:
    """It is the response's error, with its stable code; whoever waits for the answer gets the client's exception."""
    made = begun(client)
    attempt = worker.start(made)
    worker.send(made, *list(replay(1, result(*TEXT)))[:3])
    worker.fail(attempt, "engine_failed")
    failed = client.responses.retrieve(made)
    Response.model_validate(failed.to_dict())
    assert failed.status == "failed"
    assert failed.error is not None
    assert (failed.error.code, failed.error.type) == ("server_error", "engine_failed")
    whole = events(client, made)
    assert (whole[-1].type, whole[-1].response.to_dict()) == ("response.failed", failed.to_dict())
    worker.redis.flushall()
    for after in range(len(whole)):
        assert events(client, made, after)[-1] == whole[-1]
    assert events(client, made, whole[-1].sequence_number) == []
    with pytest.raises(openai.ConflictError) as raised:
        begun(client, previous_response_id=made)
    assert raised.value.code == "not_completed"


def test_cancelled_before_it_began(client: openai.OpenAI) -> None:
    """There is no output, and the events say that it never left the queue."""
    made = begun(client)
    assert client.responses.cancel(made).status == "cancelled"
    whole = events(client, made)
    assert [event.type for event in whole] == ["response.created", "response.queued", "response.incomplete"]
    assert (whole[-1].response.status, whole[-1].response.output) == ("cancelled", [])
