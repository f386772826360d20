"""The four nouns that a request becomes on its way: TaskRequest → Prompt → Job → Result.

Each is frozen. Validation happens once, where a `TaskRequest` is parsed from HTTP; everything after
travels as values that are already right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

FinishReason = Literal["stop", "length"]

#: Identifiers may not hold control characters: they go to logs, headers and SQL as they are.
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Frozen(BaseModel):
    """Base of the models that travel: immutable, strict about unknown fields and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


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


class TaskRequest(Frozen):
    """One task for one agent, as `POST /v1/tasks` takes it."""

    agent: Name = Field(description="Name of an active agent profile.", examples=["incident-responder"])
    task_type: Name = Field(default="task", description="What kind of work this is; policies read it.")
    directive: str = Field(min_length=1, description="What the agent is to do, in words.")
    context: str | dict[str, Any] | list[Any] | None = Field(
        default=None, description="What the agent is to work on: text, or JSON that is shown to it as JSON."
    )
    project_id: Name | None = Field(default=None, examples=["proj_0123456789ab"])
    artifact_id: Name | None = Field(default=None, examples=["art_0123456789ab"])
    task_id: Name | None = Field(default=None, examples=["task_0123456789ab"])
    provider_hint: Name | None = Field(
        default=None, description="Provider to use; refused if the policy forbids it. Left out, the gateway picks."
    )
    has_private_data: bool = False
    has_sensitive_data: bool = False
    is_security_task: bool = False
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _directive_says_something(self) -> TaskRequest:
        if not self.directive.strip():
            raise ValueError("directive must not be blank")
        return self


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenised prompt: the static part by its hash, the dynamic part by its token ids.

    `token_count` is the length of both together, in tokens.
    """

    static_profile_hash: str
    dynamic_token_ids: tuple[int, ...]
    token_count: int


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to run one request, as carried (signed and encrypted) by a queue message.

    `epoch` is raised in SQL each time the request is published: a message of an older epoch is refused.
    `published_at` is in seconds since the Unix epoch.
    """

    request_id: str
    epoch: int
    organization: str
    prompt: Prompt
    sampling: Sampling
    published_at: float
    data_key: bytes


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


class Result(Frozen):
    """The answer to one request, with how it was made.

    `cuts` are the lengths, in characters, of the pieces `text` was streamed in, so that a stream can be replayed
    from any cursor with the same frames after Redis has forgotten it.
    """

    text: str
    cuts: tuple[int, ...] = Field(strict=False)
    finish_reason: FinishReason
    model: str
    usage: Usage
    timings: Timings
