"""The answers of `/v1/responses`, as OpenAI's clients read them: the response object, its input, the events of its streams."""

from __future__ import annotations

from typing import Any, Literal

from gateway_app.openapi.operation import Answer, sometimes

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer):
    """Text that the model said."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[None]


class OutputMessage(Answer):
    """The message that holds the answer's text."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Answer):
    """A function that the model wants called; `arguments` is JSON text."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem = OutputMessage | OutputCall


class ResponseError(Answer):
    """Why there is no answer. OpenAI's codes are a closed list; `type` is the gateway's stable code."""

    code: Literal["server_error"]
    message: str
    type: str
    param: None
    hint: str
    retryable: bool


class IncompleteDetails(Answer):
    """Why the answer is not whole."""

    reason: Literal["max_output_tokens"]


class InputTokensDetails(Answer):
    """How much of the input the KV cache held."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokensDetails(Answer):
    """How much of the output was reasoning."""

    reasoning_tokens: Literal[0]


class ResponseUsage(Answer):
    """Token counts, under the names of the Responses API."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class NoReasoning(Answer):
    """There is none."""

    effort: None
    summary: None


class ShownFormat(Answer):
    """The form of the answer, as it was asked for."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = sometimes()
    description: str = sometimes()
    schema_: dict[str, Any] = sometimes(alias="schema")
    strict: bool = sometimes()


class ShownText(Answer):
    """How the text is shaped."""

    format: ShownFormat


class ShownTool(Answer):
    """A function that the model may ask for."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class ShownChoice(Answer):
    """The one function to call."""

    type: Literal["function"]
    name: str


class Response(Answer):
    """A response: what was asked, and what came of it."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    background: bool
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: NoReasoning
    service_tier: Literal["default", "flex", "priority"]
    store: bool
    temperature: float
    text: ShownText
    tool_choice: Literal["none", "auto", "required"] | ShownChoice
    tools: list[ShownTool]
    top_logprobs: Literal[0]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class InputText(Answer):
    """Text that the model was given."""

    type: Literal["input_text"]
    text: str


class ItemMessage(Answer):
    """A turn of the conversation."""

    id: str
    type: Literal["message"]
    role: Literal["user", "system", "assistant"]
    content: list[InputText | OutputText]
    status: Literal["completed"]


class ItemOutput(Answer):
    """What a called function returned."""

    id: str
    type: Literal["function_call_output"]
    call_id: str
    output: str
    status: Literal["completed"]


class InputItems(Answer):
    """What the response answers, earlier turns of the conversation included."""

    object: Literal["list"]
    data: list[ItemMessage | OutputCall | ItemOutput]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Numbered(Answer):
    """What every event has."""

    type: str
    sequence_number: int


class ResponseEvent(Numbered):
    """The response as it is now."""

    response: Response


class ItemEvent(Numbered):
    """An item that began or ended."""

    output_index: int
    item: OutputItem


class PartEvent(Numbered):
    """A part of a message that began or ended."""

    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class TextEvent(Numbered):
    """Text to append, or all of it."""

    item_id: str
    output_index: int
    content_index: int
    logprobs: list[None]
    delta: str = sometimes()
    text: str = sometimes()


class ArgumentsEvent(Numbered):
    """Arguments to append, or all of them with the function's name."""

    item_id: str
    output_index: int
    delta: str = sometimes()
    name: str = sometimes()
    arguments: str = sometimes()


class ErrorEvent(Numbered):
    """Why the stream ends here."""

    code: str
    message: str
    param: str | None
