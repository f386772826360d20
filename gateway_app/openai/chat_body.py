"""What `POST /v1/chat/completions` takes. A parameter that is not here is refused: ignoring it would be a lie."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from gateway_app.api.reading import validate
from gateway_app.api.task_body import Metadata
from gateway_app.openai.governance import governed
from gateway_app.openai.messages import Message
from gateway_app.openai.tools import Tool, ToolChoice, tool_use
from tasks.errors import InvalidRequest, Unsupported
from tasks.job import Frozen, Name, Priority, ResponseFormat, Sampling, TaskRequest


class SchemaFormat(Frozen):
    """A JSON Schema that the answer must fit."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class AnswerFormat(Frozen):
    """`response_format`: free text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    def wanted(self) -> ResponseFormat | None:
        """Return what the engine is told. Raises InvalidRequest if the schema is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return ResponseFormat(type="json_object")
        if self.json_schema is None:
            raise InvalidRequest("response_format is json_schema and has no json_schema", param="response_format")
        return ResponseFormat(type="json_schema", json_schema=self.json_schema.json_schema)


class StreamOptions(Frozen):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ChatBody(Frozen):
    """One conversation to be continued. `model` is an agent, whose profile goes first, or the served model."""

    model: Name = Field(examples=["incident-responder"])
    messages: list[Message] = Field(min_length=1, examples=[[{"role": "user", "content": "What is on fire?"}]])
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=0, le=1_000_000, description="Not in OpenAI's API; 0 means no limit.")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0, description="Not in OpenAI's API.")
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=16)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    response_format: AnswerFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    priority: Priority | None = Field(default=None, description="Not in OpenAI's API; service_tier says the same.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: Literal[False] | None = Field(default=None, description="Every request is recorded; nothing more is stored.")
    user: str | None = Field(default=None, max_length=512, description="Kept with the request's metadata.")

    def request(self, headers: Iterable[tuple[str, str]], model_name: str, tool_parser: str | None) -> TaskRequest:
        """Return the request this is. Raises InvalidRequest or Unsupported."""
        tools = tool_use(tuple(self.tools or ()), self.tool_choice, self.parallel_tool_calls, tool_parser)
        sampling = self._sampling()
        if tools is not None and sampling.response_format is not None:
            raise Unsupported("tools and a response_format cannot both say what the answer is", param="response_format")
        fields = governed(
            headers, metadata=self.metadata, user=self.user, priority=self.priority, tier=self.service_tier
        )
        return TaskRequest(
            api="chat",
            agent=None if self.model == model_name else self.model,
            messages=tuple(message.plain() for message in self.messages),
            tools=tools,
            sampling=sampling,
            **fields,
        )

    def _sampling(self) -> Sampling:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs wants logprobs to be true", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options wants stream to be true", param="stream_options")
        asked = {
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop,
            # Negative seeds are as good as others to their clients; the engine wants none.
            "seed": None if self.seed is None else self.seed % 2**63,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "response_format": self.response_format.wanted() if self.response_format else None,
        }
        same = ("top_p", "top_k", "min_p", "n", "presence_penalty", "frequency_penalty")
        asked |= {name: getattr(self, name) for name in same}
        return validate(Sampling, {name: value for name, value in asked.items() if value is not None})
