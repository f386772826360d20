"""A gateway over real services, its worker on vLLM: the profile's cache, tools, and answers in a given form.

Those who ask are a client of tasks, the `openai` client, and LangChain's ChatOpenAI. The model is tiny and its weights are
random, so what it says is noise; that its calls and its JSON are nevertheless whole and fit their schemas is the engine's doing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from gateway_app.local.client import Client
from tests.local_gateway import poll, text_of
from tests.services import PostgresServer, require
from tests.serving import Served, standing
from tests.tiny_model import TOOL_TEMPLATE, make_tiny_model

pytestmark = pytest.mark.vllm
AGENT = "incident-responder"
CANARY = "canary-7c1f-the-disk-of-db-1-is-full"
HELLO: list[Any] = [{"role": "user", "content": "How is the weather in Bern?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bern", "Basel"]}, "days": {"enum": [1, 2]}},
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    }
]


class Verdict(BaseModel):
    """What an answer must fit."""

    cause: Literal["network", "disk"]
    certain: bool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the worker's log is."""
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def served(folder: Path, postgres_server: PostgresServer) -> Iterator[Served]:
    """Return a gateway whose worker runs the tiny model on vLLM, with a template that shows tools."""
    model = make_tiny_model(folder / "model", template=TOOL_TEMPLATE)
    options = {"ENGINE__KIND": "vllm", "ENGINE__KV_CACHE_GIB": "0.25", "ENGINE__TOOL_PARSER": "hermes"}
    database = postgres_server.url(postgres_server.create_database())
    with standing(folder, model, database, **options) as made:
        yield made


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    """Return the client as a team would make it."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as made:
        yield made


def run(client: Client, directive: str) -> tuple[dict[str, Any], list[str]]:
    """Run a task to its end; return it as polled, once its stream has been checked against it, and its audit events' types."""
    accepted = client.submit({"agent": AGENT, "directive": directive, "sampling": {"max_tokens": 12}})
    frames = list(client.events(accepted["links"]["events"]))
    assert [frames[0].name, frames[-1].name] == ["started", "completed"], frames[-1]
    polled = poll(client, accepted)
    assert (polled["status"], polled["result"]["text"]) == ("completed", text_of(frames))
    events = client._json("GET", f"/v1/audit/events?request_id={accepted['id']}", expected=200)["data"]
    return polled, sorted(event["event_type"] for event in events)


def check_arguments(text: str) -> None:
    """Check that a call's arguments fit the function's schema."""
    arguments = json.loads(text)
    assert set(arguments) == {"city", "days"}
    assert arguments["city"] in ("Bern", "Basel")
    assert arguments["days"] in (1, 2)


def test_the_profile_is_cached(served: Served, folder: Path) -> None:
    """Two tasks for one agent: both recorded and streamed alike, the second with its profile in the cache; no log has them."""
    asked = Client(served.url, served.key)
    (cold, *_), (cached, *_) = ran = [run(asked, text) for text in (f"What now? {CANARY}", f"And then? {CANARY}")]
    for done, event_types in ran:
        assert event_types == ["completed", "received", "routing_decision", "started"]
        assert done["result"]["usage"]["output_tokens"] == 12
        assert done["result"]["timings"]["prefill_ms"] > 0
    assert cold["result"]["usage"]["cached_tokens"] == 0
    static = cached["result"]["usage"]["prompt_tokens"] - 100
    assert cached["result"]["usage"]["cached_tokens"] > static
    assert CANARY not in (folder / "worker.log").read_text()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call(client: openai.OpenAI, choice: Any) -> None:
    """Whole and streamed, the call has an id, a name and arguments that fit; the client adds the fragments up."""
    asked: dict[str, Any] = {
        "model": AGENT,
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 200,
        "seed": 1,
        "parallel_tool_calls": False,
    }
    answer = client.chat.completions.create(**asked)
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.id
    assert call.function.name == "weather"
    check_arguments(call.function.arguments)
    assert answer.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    [streamed] = final.choices[0].message.tool_calls or []
    assert streamed.function.name == "weather"
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_a_model_that_is_free_to_call(client: openai.OpenAI) -> None:
    """It says whatever it says; tools alone change the prompt, and nothing is lost."""
    plain = client.chat.completions.create(model=AGENT, messages=HELLO, max_tokens=8)
    free = client.chat.completions.create(model=AGENT, messages=HELLO, tools=TOOLS, max_tokens=8)
    assert plain.usage is not None
    assert free.usage is not None
    assert free.usage.prompt_tokens > plain.usage.prompt_tokens
    assert free.usage.completion_tokens > 0


def test_an_answer_that_fits_a_schema(client: openai.OpenAI) -> None:
    """The client parses it into the model it was given, whole and through Responses."""
    parsed = client.chat.completions.parse(model=AGENT, messages=HELLO, response_format=Verdict, max_tokens=100)
    assert parsed.choices[0].message.parsed is not None
    assert parsed.choices[0].message.parsed.cause in ("network", "disk")
    response = client.responses.parse(model=AGENT, input="Why?", text_format=Verdict, max_output_tokens=100)
    assert response.output_parsed is not None


def test_a_schema_that_cannot_be_followed(client: openai.OpenAI) -> None:
    """It is one clear error of the request, and the engine goes on."""
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        client.chat.completions.create(model=AGENT, messages=HELLO, response_format=broken, max_tokens=20)
    assert raised.value.code == "unsupported"
    assert client.chat.completions.create(model=AGENT, messages=HELLO, max_tokens=2).choices


def test_a_tool_loop_of_langchain(served: Served) -> None:
    """The model calls, the tool answers, the model goes on from there."""
    require("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    model = ChatOpenAI(
        model=AGENT,
        base_url=f"{served.url}/v1",
        api_key=SecretStr(served.key),
        max_completion_tokens=120,
        temperature=0.5,
        max_retries=0,
    )
    messages: list[Any] = [HumanMessage("How is the weather in Bern?")]
    asked = model.bind_tools(TOOLS, tool_choice="required", parallel_tool_calls=False).invoke(messages)
    [call] = asked.tool_calls
    assert call["name"] == "weather"
    check_arguments(json.dumps(call["args"]))
    messages += [asked, ToolMessage("Sunny, 21 degrees.", tool_call_id=call["id"])]
    after = model.bind_tools(TOOLS).invoke(messages, max_completion_tokens=8)
    assert after.usage_metadata is not None
    assert after.usage_metadata["output_tokens"] > 0
    pieces = list(model.stream(messages, max_completion_tokens=8))
    assert any(piece.response_metadata.get("finish_reason") for piece in pieces)
    verdict = model.with_structured_output(Verdict).invoke("Why?")
    assert isinstance(verdict, Verdict)
