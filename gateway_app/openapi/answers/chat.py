"""The answers of `/v1/chat/completions` and `/v1/models`, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Literal

from gateway_app.openapi.operation import Answer, sometimes
from tasks.job import FinishReason


class Model(Answer):
    """An agent, or the served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    """What `model` may be."""

    object: Literal["list"]
    data: list[Model]


class ChatFunction(Answer):
    """The function to call; `arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class ChatToolCall(Answer):
    """A call that the model wants."""

    id: str
    type: Literal["function"]
    function: ChatFunction


class ChatMessage(Answer):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ChatToolCall] = sometimes()


class ChatToken(Answer):
    """A token, its log probability, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatToken):
    """A token of the answer, with the likeliest in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(Answer):
    """The log probability of each token."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatChoice(Answer):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class CachedTokens(Answer):
    """How much of the prompt the KV cache held."""

    cached_tokens: int


class ChatUsage(Answer):
    """Token counts, under OpenAI's names."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatHead(Answer):
    """What completion and chunks begin with."""

    id: str
    created: int
    model: str
    service_tier: Literal["default", "flex", "priority"]
    system_fingerprint: None


class ChatCompletion(ChatHead):
    """A whole chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: ChatUsage


class ChatFunctionDelta(Answer):
    """Part of a function call."""

    name: str = sometimes()
    arguments: str


class ChatToolCallDelta(Answer):
    """Part of a call; its first part has id, type and name."""

    index: int
    id: str | None = sometimes()
    type: Literal["function"] = sometimes()
    function: ChatFunctionDelta


class ChatDelta(Answer):
    """What a chunk adds."""

    role: Literal["assistant"] = sometimes()
    content: str = sometimes()
    tool_calls: list[ChatToolCallDelta] = sometimes()


class ChatChunkChoice(Answer):
    """Which answer grows, and by what."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(ChatHead):
    """An event of a streamed completion. With `include_usage`, a last one has no choices and the usage."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None = sometimes()
