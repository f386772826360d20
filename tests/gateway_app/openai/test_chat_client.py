"""The `openai` client, unchanged but for base URL and key, against a gateway with a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tasks.settings import PREFIX, settings
from tests.services import RedisServer
from tests.serving import Served, serve, standing

AGENT = "incident-responder"
HELLO: list[Any] = [{"role": "user", "content": "What is on fire?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Served]:
    """Return a gateway with a simulated worker, shared by this module's tests."""
    with standing(tmp_path_factory.mktemp("gateway"), tiny_model) as made:
        yield made


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    """Return the client as a team would make it."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, **options: Any) -> ChatCompletion:
    """Return a short completion."""
    asked: dict[str, Any] = {"model": AGENT, "messages": HELLO, "max_tokens": 12, "seed": 5, **options}
    answer = client.chat.completions.create(**asked)
    assert isinstance(answer, ChatCompletion)
    return answer


def streamed(client: openai.OpenAI, **options: Any) -> list[ChatCompletionChunk]:
    """Return the chunks of the same."""
    asked: dict[str, Any] = {"model": AGENT, "messages": HELLO, "max_tokens": 12, "seed": 5, "stream": True, **options}
    return list(client.chat.completions.create(**asked))


def text(chunks: list[ChatCompletionChunk], choice: int = 0) -> str:
    """Return the text that chunks add up to."""
    parts = [part for chunk in chunks for part in chunk.choices if part.index == choice]
    return "".join(part.delta.content or "" for part in parts)


def test_a_completion(client: openai.OpenAI) -> None:
    """Whole, with usage, and the same again for the same seed."""
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert ask(client).choices[0].message.content == answer.choices[0].message.content
    assert ask(client, seed=6).choices[0].message.content != answer.choices[0].message.content


def test_a_stream_says_what_the_completion_says(client: openai.OpenAI) -> None:
    """Role first, then text, then how it ended; usage only when asked for."""
    chunks = streamed(client)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text(chunks) == ask(client).choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks)
    last = streamed(client, stream_options={"include_usage": True})[-1]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 12


def test_several_choices(client: openai.OpenAI) -> None:
    """Each is a text of its own, whole and streamed."""
    answer = ask(client, n=3)
    whole = [choice.message.content for choice in answer.choices]
    assert len(set(whole)) == 3
    chunks = streamed(client, n=3)
    assert [text(chunks, index) for index in range(3)] == whole
    finished = [part.index for chunk in chunks for part in chunk.choices if part.finish_reason]
    assert sorted(finished) == [0, 1, 2]


def test_log_probabilities(client: openai.OpenAI) -> None:
    """One a token, with as many alternatives as asked for; none unless asked for."""
    assert ask(client).choices[0].logprobs is None
    logprobs = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 12
    assert {len(token.top_logprobs) for token in logprobs.content} == {2}
    shown = [part.logprobs for chunk in streamed(client, logprobs=True) for part in chunk.choices if part.logprobs]
    assert sum(len(item.content or ()) for item in shown) == 12


def test_the_served_model_has_no_profile(client: openai.OpenAI) -> None:
    """It gets the caller's messages alone; an agent's prompt is longer by its profile."""
    model = client.models.list().data[-1].id
    assert AGENT in {known.id for known in client.models.list()}
    assert client.models.retrieve(AGENT).id == AGENT
    alone, agent = ask(client, model=model), ask(client)
    assert alone.usage is not None
    assert agent.usage is not None
    assert agent.usage.prompt_tokens > alone.usage.prompt_tokens + 500


def test_content_parts_and_system_messages(client: openai.OpenAI) -> None:
    """Parts are text; a developer message is a system message."""
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "What is on fire?"}]}]
    assert ask(client, messages=parts).choices == ask(client).choices
    developer, system = (
        ask(client, messages=[{"role": role, "content": "Be brief."}, *HELLO]) for role in ("developer", "system")
    )
    assert developer.choices == system.choices


def test_what_governance_reads(client: openai.OpenAI, served: Served) -> None:
    """Headers and metadata reach the record; a header wins."""
    answer = ask(
        client,
        metadata={"project_id": "proj_0123456789ab", "task_type": "other", "team": "blue"},
        extra_headers={"X-MetaQore-Task-Type": "plan", "X-MetaQore-Has-Private-Data": "true"},
        service_tier="priority",
        user="somebody",
    )
    task = client.get(f"{served.url}/v1/tasks/{answer.id}", cast_to=object)
    assert isinstance(task, dict)
    assert task["project_id"] == "proj_0123456789ab"
    assert (task["api"], task["priority"]) == ("chat", "high")
    assert task["metadata"]["team"] == "blue"
    assert answer.service_tier == "priority"


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "unknown_agent"),
        ({"temperature": 9}, openai.UnprocessableEntityError, "invalid_request"),
        ({"logit_bias": {"1": 1}}, openai.UnprocessableEntityError, "invalid_request"),
        ({"messages": []}, openai.UnprocessableEntityError, "invalid_request"),
        ({"max_tokens": 999_999}, openai.UnprocessableEntityError, "prompt_too_long"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.UnprocessableEntityError, "unsupported"),
        ({"extra_headers": {"X-MetaQore-Task": "x"}}, openai.UnprocessableEntityError, "invalid_request"),
        ({"extra_headers": {"Content-Type": "text/plain"}}, openai.APIStatusError, "unsupported_media_type"),
        (
            {"extra_headers": {"X-MetaQore-Provider-Hint": "openrouter", "X-MetaQore-Has-Private-Data": "true"}},
            openai.PermissionDeniedError,
            "policy_veto",
        ),
    ],
)
def test_errors_are_the_clients_own(
    client: openai.OpenAI, options: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    """Each arrives as the client's exception, with the stable code."""
    with pytest.raises(error) as raised:
        ask(client, **options)
    assert raised.value.code == code


def test_a_wrong_key(served: Served) -> None:
    """It is the client's AuthenticationError."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="mq_wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            ask(client)


def test_an_idempotency_key(client: openai.OpenAI) -> None:
    """The same request is the same completion; another body is the client's ConflictError."""
    headers = {"Idempotency-Key": "once-and-only"}
    first = ask(client, extra_headers=headers, seed=None)
    assert ask(client, extra_headers=headers, seed=None) == first
    with pytest.raises(openai.ConflictError) as raised:
        ask(client, extra_headers=headers, seed=None, max_tokens=11)
    assert raised.value.code == "idempotency_conflict"


def test_a_full_queue(configured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the client's RateLimitError, and says when to come back."""
    monkeypatch.setenv(f"{PREFIX}SCHEDULING__MAX_WAITING", "1")
    settings.cache_clear()
    with serve() as full, openai.OpenAI(base_url=f"{full.url}/v1", api_key=full.key, max_retries=0) as client:
        requests.post(f"{full.url}/v1/tasks", json={"agent": AGENT, "directive": "x"}, headers=full.headers, timeout=10)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client)
        assert raised.value.code == "queue_full"
        assert int(raised.value.response.headers["Retry-After"]) > 0


def test_a_queue_that_is_away(configured: None, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the client's InternalServerError, marked as worth another try."""
    monkeypatch.setenv("REDIS_URL", own_redis.url)
    settings.cache_clear()
    with serve() as served, openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.key, max_retries=0) as client:
        own_redis.kill()
        with pytest.raises(openai.InternalServerError) as raised:
            ask(client)
        assert (raised.value.status_code, raised.value.code) == (503, "queue_unavailable")
        assert raised.value.response.headers["x-should-retry"] == "true"
