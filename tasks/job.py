"""The four nouns that a request becomes on its way: TaskRequest → Prompt → Job → Result.

Each is frozen. Validation happens once, where HTTP is read; everything after travels as values that are already right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

#: The segments that a profile may share with others: hash, and tokens from the beginning to its end.
Chain = tuple[tuple[str, int], ...]
FinishReason = Literal["stop", "length", "tool_calls"]
Priority = Literal["low", "normal", "high"]

#: Identifiers may not hold control characters: they go to logs, headers and SQL as they are.
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]

_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII | re.IGNORECASE)


def _is_rfc_3339(value: object) -> object:
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC_3339.fullmatch(value)):
        return value
    raise ValueError("must be a date and a time with a time zone, as RFC 3339 writes them")


#: An instant as text. By itself pydantic would take numbers, too, for seconds or milliseconds since 1970.
Instant = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_is_rfc_3339)]


class Frozen(BaseModel):
    """Base of the models that travel: immutable, strict about unknown fields and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ResponseFormat(Frozen):
    """What form the answer must have: any JSON object, or JSON that fits a schema."""

    type: Literal["json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(default=None, description="The JSON Schema, with type json_schema.")


class Sampling(Frozen):
    """How tokens are chosen. The defaults are the engine's usual ones, except that `seed` is always fixed.

    A fixed seed makes a retry after a crash likely to give the text that was already shown.
    """

    max_tokens: int = Field(default=256, ge=1, le=1_000_000, description="Upper bound of output tokens.")
    temperature: float = Field(default=0.7, ge=0.0, le=2.0, description="0 is greedy.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1_000_000, description="0 means no limit.")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    stop: tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...] = Field(
        default=(), max_length=4, strict=False, description="Text at which the answer ends; not part of it."
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Chosen by the gateway if left out.")
    n: int = Field(default=1, ge=1, le=16, description="Independent answers to the same prompt.")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="Report each token's log probability, with this many alternatives."
    )
    response_format: ResponseFormat | None = None


class ToolUse(Frozen):
    """The functions a model may ask for. `tools` are in OpenAI's shape; a `choice` that names one forces that one."""

    tools: tuple[dict[str, Any], ...] = Field(min_length=1, strict=False)
    choice: str = Field(default="auto", description="auto, required, or function:NAME.")
    parallel: bool = True


class TaskRequest(Frozen):
    """One request to the model, whichever API it came through: what governance reads, and what is asked.

    `agent` names the profile that goes before the messages; without one, the served model gets the messages alone.
    `messages` are in OpenAI's shape, their content reduced to text.
    """

    api: Literal["tasks", "chat", "responses"] = "tasks"
    agent: Name | None = None
    task_type: Name = "task"
    project_id: Name | None = None
    artifact_id: Name | None = None
    task_id: Name | None = None
    provider_hint: Name | None = None
    has_private_data: bool = False
    has_sensitive_data: bool = False
    is_security_task: bool = False
    messages: tuple[dict[str, Any], ...] = Field(min_length=1, strict=False)
    tools: ToolUse | None = None
    sampling: Sampling = Sampling()
    metadata: dict[str, str] = Field(default_factory=dict)
    priority: Priority = "normal"
    deadline: datetime | None = None
    asked: dict[str, Any] = Field(
        default_factory=dict, description="What its API shows again of the request, in that API's own words."
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt: the static part by its hash, the dynamic part by its token ids.

    `token_count` is the length of both together, in tokens. `chain` are the segments that the static part may share with
    other profiles: the hash of each (32 hexadecimal digits), and how many tokens the prompt has to its end.
    """

    static_profile_hash: str
    dynamic_token_ids: tuple[int, ...]
    token_count: int
    chain: Chain = ()

    @property
    def static_tokens(self) -> int:
        """Return the length of the static part."""
        return self.token_count - len(self.dynamic_token_ids)


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to run one request, as carried (signed and encrypted) by a queue message.

    `epoch` is raised in SQL each time the request is published: a message of an older epoch is refused.
    `published_at` is in seconds since the Unix epoch. `trace_context` is the trace it belongs to, if one is recorded.
    """

    request_id: str
    epoch: int
    organization: str
    prompt: Prompt
    sampling: Sampling
    published_at: float
    data_key: bytes
    tools: ToolUse | None = None
    priority: Priority = "normal"
    trace_context: str | None = None


class Usage(Frozen):
    """Token counts of one finished request; `cached_tokens` is the part of the prompt found in the KV cache."""

    prompt_tokens: int = Field(ge=0)
    cached_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)


class Timings(Frozen):
    """Where the time went, in milliseconds.

    `queued_ms` runs from publishing to a worker taking the message; `prefill_ms` from the engine scheduling the
    prompt to its first token; `first_token_ms` (TTFT) from publishing to the first token; `total_ms` to the last.
    """

    queued_ms: float = Field(ge=0)
    prefill_ms: float | None = Field(default=None, ge=0)
    first_token_ms: float | None = Field(default=None, ge=0)
    total_ms: float = Field(ge=0)


class ToolCallDelta(Frozen):
    """Part of one call of a function; `id` and `name` come with the call's first part, `arguments` grow as text."""

    index: int = Field(ge=0)
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class TokenLogprob(Frozen):
    """One token's log probability; `top` are the most likely tokens in its place, as (token, log probability)."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = Field(default=(), strict=False)


class Piece(Frozen):
    """What one frame adds to one of the answer's choices."""

    text: str = ""
    choice: int = Field(default=0, ge=0)
    tool_calls: tuple[ToolCallDelta, ...] = Field(default=(), strict=False)
    logprobs: tuple[TokenLogprob, ...] = Field(default=(), strict=False)


class ToolCall(Frozen):
    """A function the model wants called; `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Choice(Frozen):
    """One whole answer. `finish_reason` is None if the request was ended before the model did."""

    text: str
    finish_reason: FinishReason | None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class Result(Frozen):
    """The answer to one request, with how it was made.

    `pieces` are what the stream's frames carried, in order, so that a stream can be replayed from any cursor with the
    same frames after Redis has forgotten it. `finish_reasons` has one element a choice, and none of a request that
    was cancelled or expired while it ran.
    """

    pieces: tuple[Piece, ...] = Field(strict=False)
    finish_reasons: tuple[FinishReason, ...] = Field(strict=False)
    model: str
    usage: Usage
    timings: Timings

    @property
    def finish_reason(self) -> FinishReason | None:
        """Return how the first choice ended."""
        return self.finish_reasons[0] if self.finish_reasons else None

    @property
    def text(self) -> str:
        """Return the first choice's text."""
        return "".join(piece.text for piece in self.pieces if piece.choice == 0)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Return the whole answers, put together from the pieces."""
        count = max([len(self.finish_reasons), 1, *(piece.choice + 1 for piece in self.pieces)])
        return tuple(self._choice(index) for index in range(count))

    def _choice(self, index: int) -> Choice:
        pieces = [piece for piece in self.pieces if piece.choice == index]
        return Choice(
            text="".join(piece.text for piece in pieces),
            finish_reason=self.finish_reasons[index] if index < len(self.finish_reasons) else None,
            tool_calls=_whole_calls([delta for piece in pieces for delta in piece.tool_calls]),
            logprobs=tuple(logprob for piece in pieces for logprob in piece.logprobs),
        )


def _whole_calls(deltas: list[ToolCallDelta]) -> tuple[ToolCall, ...]:
    calls: dict[int, list[ToolCallDelta]] = {}
    for delta in deltas:
        calls.setdefault(delta.index, []).append(delta)
    return tuple(
        ToolCall(
            id=next((part.id for part in parts if part.id), ""),
            name="".join(part.name or "" for part in parts),
            arguments="".join(part.arguments for part in parts),
        )
        for _, parts in sorted(calls.items())
    )
