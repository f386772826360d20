"""OpenAI's own client, unchanged but for base URL and key: responses made, refused and continued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
import requests

from tests.fleet import Fleet
from tests.responding import AGENT, TOKENS, ask, stream


def test_a_response(client: openai.OpenAI) -> None:
    """Whole, with usage, and the same when it is retrieved."""
    made = ask(client, instructions="Be brief.", metadata={"team": "blue"}, user="somebody", temperature=0.5)
    assert made.id.startswith("gw_")
    assert (made.object, made.status, made.model) == ("response", "incomplete", AGENT)
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"
    assert made.output_text
    assert (made.instructions, made.metadata, made.user) == ("Be brief.", {"team": "blue"}, "somebody")
    assert (made.temperature, made.max_output_tokens, made.background) == (0.5, 12, False)
    assert made.usage is not None
    assert made.usage.output_tokens == 12
    assert made.usage.input_tokens > 500
    assert made.usage.total_tokens == made.usage.input_tokens + 12
    assert client.responses.retrieve(made.id) == made


def test_an_answer_that_the_model_ends_is_completed(client: openai.OpenAI) -> None:
    """Its usage tells of the profile that was in the cache."""
    ask(client)
    made = ask(client, max_output_tokens=None)
    assert (made.status, made.incomplete_details, made.error) == ("completed", None, None)
    assert made.completed_at is not None
    assert made.completed_at >= made.created_at
    assert made.usage is not None
    assert made.usage.output_tokens == TOKENS
    assert made.usage.input_tokens_details.cached_tokens > 500


def test_a_stream_says_what_the_response_says(client: openai.OpenAI) -> None:
    """The events come in OpenAI's order, and text and last object are those of the response."""
    events = stream(client)
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    made = client.responses.retrieve(events[0].response.id)
    assert events[-1].response.to_dict() == made.to_dict()
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == made.output_text == ask(client).output_text


def test_the_clients_own_accumulator(client: openai.OpenAI) -> None:
    """`responses.stream` gives the final response, of a new one and of one by its id."""
    with client.responses.stream(model=AGENT, input="What is on fire?", extra_body={"seed": 6}) as events:
        final = events.get_final_response()
    assert final.status == "completed"
    with client.responses.stream(response_id=final.id, starting_after=3) as again:
        assert next(iter(again)).sequence_number == 4
        assert again.get_final_response().output_text == final.output_text


def test_a_conversation(client: openai.OpenAI) -> None:
    """What went before is the prompt's, but for its instructions; the items of it all can be listed."""
    first = ask(client, instructions="Answer as a pirate. " * 20)
    second = ask(client, input=[{"role": "user", "content": "And then?"}], previous_response_id=first.id)
    whole = ask(
        client,
        input=[
            {"role": "user", "content": "What is on fire?"},
            {"role": "assistant", "content": first.output_text},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "And then?"}]},
        ],
    )
    assert second.output_text == whole.output_text
    assert second.usage is not None
    assert whole.usage is not None
    assert second.usage.input_tokens == whole.usage.input_tokens
    assert second.previous_response_id == first.id
    third = ask(client, input=[*second.output, {"role": "user", "content": "Thanks."}])
    assert third.usage is not None
    items = list(client.responses.input_items.list(second.id, order="asc", limit=2))
    assert [(item.type, getattr(item, "role", None)) for item in items] == [
        ("message", "user"),
        ("message", "assistant"),
        ("message", "user"),
    ]
    assert len({item.id for item in items}) == 3
    newest = client.responses.input_items.list(second.id, limit=1)
    assert (newest.data[0], newest.has_more) == (items[-1], True)


def test_another_organization(fleet: Fleet, client: openai.OpenAI) -> None:
    """Its responses are not found, not continued and not cancelled; nor are requests of another API."""
    made = ask(client)
    with fleet.client(key=fleet.other_key) as other:
        refused: list[Callable[[], Any]] = [
            lambda: other.responses.retrieve(made.id),
            lambda: other.responses.retrieve(made.id, stream=True),
            lambda: other.responses.cancel(made.id),
            lambda: other.responses.input_items.list(made.id),
            lambda: ask(other, previous_response_id=made.id),
        ]
        chat = client.chat.completions.create(model=AGENT, messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
        refused += [lambda: client.responses.retrieve(chat.id), lambda: client.responses.retrieve("resp_123")]
        for call in refused:
            with pytest.raises(openai.NotFoundError) as raised:
                call()
            assert raised.value.code == "not_found"


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"model": "nobody"}, "unknown_agent", None),
        ({"temperature": 9}, "invalid_request", "temperature"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "invalid_request", "input.0.message.role"),
        ({"extra_body": {"top_typo": 1}}, "invalid_request", "top_typo"),
        ({"max_output_tokens": 999_999}, "prompt_too_long", None),
        ({"tools": [{"type": "web_search"}]}, "unsupported", "tools"),
        ({"include": ["message.output_text.logprobs"]}, "unsupported", "include"),
        ({"reasoning": {"effort": "high"}}, "unsupported", "reasoning"),
        ({"truncation": "auto"}, "unsupported", "truncation"),
        ({"conversation": "conv_1"}, "unsupported", "conversation"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "unsupported",
            "input",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported", "input"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]}, "invalid_request", "input"),
        ({"extra_headers": {"X-MetaQore-Task": "x"}}, "invalid_request", None),
    ],
)
def test_refusals_are_the_clients_exceptions(
    client: openai.OpenAI, options: dict[str, Any], code: str, param: str | None
) -> None:
    """Each with the stable code and the parameter that it is about; each recorded under an id."""
    with pytest.raises(openai.APIStatusError) as raised:
        ask(client, **options)
    body: Any = raised.value.body
    assert (body["code"], body["param"]) == (code, param)
    assert body["request_id"].startswith("gw_")


def test_what_is_not_offered(fleet: Fleet, client: openai.OpenAI) -> None:
    """The record is immutable; a place in the stream is a place in a stream."""
    made = ask(client, store=False)
    with pytest.raises(openai.APIStatusError) as raised:
        client.responses.delete(made.id)
    assert (raised.value.status_code, raised.value.code) == (405, "method_not_allowed")
    assert client.responses.retrieve(made.id).to_dict()["store"] is False
    answer = requests.get(f"{fleet.url}/v1/responses/{made.id}?starting_after=1", headers=fleet.headers, timeout=10)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "starting_after")


def test_what_governance_reads(client: openai.OpenAI) -> None:
    """Headers and metadata reach the record; so does the key that makes a request one and the same."""
    headers = {"X-MetaQore-Task-Type": "plan", "Idempotency-Key": "once-and-only"}
    metadata = {"project_id": "proj_0123456789ab"}
    made = ask(client, metadata=metadata, service_tier="priority", extra_headers=headers)
    task: Any = client.get(f"{client.base_url}tasks/{made.id}", cast_to=object)
    assert (task["api"], task["project_id"], task["priority"]) == ("responses", "proj_0123456789ab", "high")
    assert made.service_tier == "priority"
    assert ask(client, metadata=metadata, service_tier="priority", extra_headers=headers) == made
