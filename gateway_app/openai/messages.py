"""Messages as OpenAI's clients send them, reduced to what a text model's chat template knows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from tasks.job import Frozen


class TextPart(Frozen):
    """Part of a message's content. Text is the only kind this gateway's models read."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class CalledFunction(Frozen):
    """A function that the model asked for; `arguments` is JSON text."""

    name: str
    arguments: str


class PastToolCall(Frozen):
    """A call the model made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Frozen):
    """One turn of a conversation. `developer` is OpenAI's newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[PastToolCall] | None = None
    tool_call_id: str | None = None
    # What a client sends back of an earlier answer, and always empty here.
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs tool_call_id")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant message has tool_calls")
        return self

    def plain(self) -> dict[str, Any]:
        """Return the message for a chat template: its content as one text, nothing that is empty."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text_of(self.content),
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def text_of(content: str | list[TextPart] | None) -> str:
    """Return content as one text, its parts on lines of their own, as vLLM joins them."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)
