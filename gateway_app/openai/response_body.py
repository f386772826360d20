"""What `POST /v1/responses` takes. A parameter that is not here is refused: ignoring it would be a lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from gateway_app.api.reading import validate
from gateway_app.api.task_body import Metadata
from gateway_app.openai.chat_body import SchemaFormat
from gateway_app.openai.governance import governed
from gateway_app.openai.response_input import ITEM_KINDS, Input, conversation
from gateway_app.openai.tools import Function, FunctionName, NamedFunction, NamedTool, Tool, tool_use
from tasks.errors import Unsupported
from tasks.job import Frozen, Name, Priority, ResponseFormat, Sampling, TaskRequest, ToolUse

#: Parameters of OpenAI's API that this gateway has nothing for. Given, but empty, they ask for nothing.
NOT_OFFERED = (
    *("access_programs", "background_options", "context_management", "conversation", "image", "include"),
    *("max_tool_calls", "moderation", "prompt", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    *("reasoning", "safety_identifier", "top_logprobs"),
)
_TEXT_PARTS = ("text", "input_text", "output_text")
#: What the response object shows of the body as it was sent. The input is the request's messages.
_NOT_SHOWN = {"input", "stream", "stream_options", "service_tier", "priority", "seed", "top_k", "min_p"}
Messages = Iterable[Mapping[str, Any]]


class FunctionTool(Function):
    """A function the model may ask for."""

    type: Literal["function"]


class FunctionChoice(NamedFunction):
    """The one function to call."""

    type: Literal["function"]
    name: FunctionName


class PlainFormat(Frozen):
    """Free text, or any JSON object."""

    type: Literal["text", "json_object"]


class SchemaTextFormat(SchemaFormat):
    """JSON that fits a schema."""

    type: Literal["json_schema"]


class TextConfig(Frozen):
    """The form of the answer."""

    format: Annotated[PlainFormat | SchemaTextFormat, Field(discriminator="type")] | None = None
    verbosity: None = None

    def wanted(self) -> ResponseFormat | None:
        """Return what the engine is told."""
        if isinstance(self.format, SchemaTextFormat):
            return ResponseFormat(type="json_schema", json_schema=self.format.json_schema)
        if self.format is None or self.format.type == "text":
            return None
        return ResponseFormat(type="json_object")


class ResponseStreamOptions(Frozen):
    """What a stream holds beside the answer: here, nothing."""

    include_obfuscation: Literal[False] | None = None


class ResponseBody(Frozen):
    """One response to be made. `model` is an agent, whose profile goes first, or the served model."""

    model: Name = Field(examples=["incident-responder"])
    input: Input = Field(examples=["What is on fire?"])
    instructions: str | None = Field(default=None, description="A system message for this response alone.")
    previous_response_id: str | None = Field(
        default=None, description="The response whose conversation this one continues, without its instructions."
    )
    background: bool | None = Field(default=None, description="Answer at once, and let nobody's going away cancel it.")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    text: TextConfig | None = None
    tools: list[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    store: bool | None = Field(
        default=None, description="Every request is recorded and can be retrieved, whatever is said here."
    )
    truncation: Literal["disabled"] | None = None
    user: str | None = Field(default=None, max_length=512, description="Kept with the request's metadata.")
    priority: Priority | None = Field(default=None, description="Not in OpenAI's API; service_tier says the same.")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Not in OpenAI's API.")
    top_k: int | None = Field(default=None, ge=0, le=1_000_000, description="Not in OpenAI's API; 0 means no limit.")
    min_p: float | None = Field(default=None, ge=0.0, le=1.0, description="Not in OpenAI's API.")

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> ResponseBody:
        """Return the body. Raises Unsupported for what OpenAI's API has and this one has not, else InvalidRequest."""
        for name in NOT_OFFERED:
            if content.get(name) not in (None, [], {}, 0):
                raise Unsupported(f"{name} is not offered by this gateway", param=name)
        if any(_kind(tool, "function") != "function" for tool in _listed(content.get("tools"))):
            raise Unsupported("functions are the only tools this gateway offers", param="tools")
        if _kind(content.get("tool_choice"), "function") != "function":
            raise Unsupported("a tool_choice is none, auto, required or one function", param="tool_choice")
        items = _listed(content.get("input"))
        if any(_kind(item, "message") not in ITEM_KINDS for item in items):
            raise Unsupported("messages, function calls and their outputs are the only input items", param="input")
        parts = [part for item in items for name in ("content", "output") for part in _listed(_field(item, name))]
        if any(_kind(part, "input_text") not in _TEXT_PARTS for part in parts):
            raise Unsupported("text is the only content this gateway's models read", param="input")
        if content.get("truncation") == "auto":
            raise Unsupported("a conversation is never cut to fit the model's context window", param="truncation")
        return validate(cls, {name: value for name, value in content.items() if name not in NOT_OFFERED})

    def request(
        self,
        headers: Iterable[tuple[str, str]],
        model_name: str,
        tool_parser: str | None,
        earlier: Callable[[str], Messages],
    ) -> TaskRequest:
        """Return the request this is. Raises InvalidRequest or Unsupported.

        `earlier` returns the conversation of an earlier response, its answer included, or raises a GatewayError.
        """
        tools, sampling = self._tools(tool_parser), self._sampling()
        if tools is not None and sampling.response_format is not None:
            raise Unsupported("tools and a text.format cannot both say what the answer is", param="text.format")
        fields = governed(
            headers, metadata=self.metadata, user=self.user, priority=self.priority, tier=self.service_tier
        )
        before = () if self.previous_response_id is None else earlier(self.previous_response_id)
        system = () if self.instructions is None else ({"role": "system", "content": self.instructions},)
        return TaskRequest(
            api="responses",
            agent=None if self.model == model_name else self.model,
            messages=(*system, *conversation(before, self.input)),
            tools=tools,
            sampling=sampling,
            asked=self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=_NOT_SHOWN),
            **fields,
        )

    def _tools(self, parser: str | None) -> ToolUse | None:
        tools = tuple(
            Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools or ()
        )
        choice = self.tool_choice
        if isinstance(choice, FunctionChoice):
            named = NamedTool(type="function", function=NamedFunction(name=choice.name))
            return tool_use(tools, named, self.parallel_tool_calls, parser)
        return tool_use(tools, choice, self.parallel_tool_calls, parser)

    def _sampling(self) -> Sampling:
        asked = {
            "max_tokens": self.max_output_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "response_format": self.text.wanted() if self.text else None,
        }
        asked |= {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "seed")}
        return validate(Sampling, {name: value for name, value in asked.items() if value is not None})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else None


def _kind(item: Any, default: str) -> Any:
    """Return the type that an object says it is; what is no object at all is left to validation."""
    return item.get("type", default) if isinstance(item, dict) else default
