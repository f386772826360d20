"""The answers of `/v1/tasks`."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from gateway_app.openapi.operation import Answer, sometimes
from tasks.governance.secure_gateway import Sensitivity, Veto
from tasks.job import FinishReason, Priority, Timings, TokenLogprob, ToolCall, ToolCallDelta, Usage
from tasks.queueing.pull import Strategy

State = Literal["queued", "running", "completed", "failed", "cancelled", "expired", "dead"]
Api = Literal["tasks", "chat", "responses"]


class TaskLinks(Answer):
    """Where the task can be polled and watched."""

    self: str
    events: str
    stream: str


class Accepted(Answer):
    """A task that is recorded and queued."""

    id: str
    status: Literal["queued"]
    agent: str
    sensitivity: Sensitivity
    provider: str
    prompt_tokens: int
    links: TaskLinks


class TaskSummary(Answer):
    """A request, through whichever API it came. `attempt` is how often it was begun."""

    id: str
    status: State
    cancelling: bool = Field(description="Somebody cancelled it, and its worker has not ended it yet.")
    api: Api
    agent: str
    project_id: str | None
    priority: Priority
    attempt: int
    created_at: AwareDatetime
    deadline: AwareDatetime | None
    finished_at: AwareDatetime | None
    links: TaskLinks


class TaskPage(Answer):
    """Requests, the newest first."""

    data: list[TaskSummary]
    has_more: bool


class TaskChoice(Answer):
    """One of several answers to the same prompt."""

    text: str
    finish_reason: FinishReason | None
    tool_calls: list[ToolCall]
    logprobs: list[TokenLogprob]


class TaskResult(Answer):
    """What the model said. The first choice's text is `text`; if there are several, `choices` holds them all."""

    text: str
    finish_reason: FinishReason | None
    model: str
    usage: Usage
    timings: Timings
    choices: list[TaskChoice] = sometimes()
    tool_calls: list[ToolCall] = sometimes()
    logprobs: list[TokenLogprob] = sometimes()


class TaskError(Answer):
    """Why there is no answer, or no whole one."""

    code: str
    message: str
    hint: str
    retryable: bool
    veto: Veto = sometimes("Why governance refused it when it left the queue.")


class Task(TaskSummary):
    """A request with what became of it."""

    metadata: dict[str, str]
    result: TaskResult = sometimes()
    error: TaskError = sometimes()


class AttemptBegun(Answer):
    """The engine begins. `reset` instead of `started` means: drop the text of the attempt before."""

    attempt: int


class DeltaShown(Answer):
    """Text to append, with the parts of tool calls and the log probabilities that came with it."""

    text: str
    choice: int = sometimes("Which answer grows, of several; the first, 0, is left out.")
    tool_calls: list[ToolCallDelta] = sometimes()
    logprobs: list[TokenLogprob] = sometimes()


class TaskCompleted(Answer):
    """The end of an answered request."""

    finish_reason: FinishReason
    finish_reasons: list[FinishReason] = sometimes("Of each answer, if there are several.")
    model: str
    usage: Usage
    timings: Timings


class TaskEnded(Answer):
    """The end of a request without an answer."""

    code: str | None
    message: str


class Candidate(Answer):
    """A profile whose requests were looked at. What it lacked in the worker's KV cache would have taken `seconds`."""

    name: str
    static_profile_hash: str
    waiting: int
    waited_s: float = Field(description="How long these have waited, all together, where that mattered.")
    static_tokens: int
    cached_tokens: int
    seconds: float
    copies: int = Field(description="How many other workers held the profile, where that mattered.")
    price_s: float | None = Field(description="The lowest one wins: seconds of waiting count against it.")
    eligible_in_s: float = Field(description="Until then it is left to others, or to be computed.")


class ScheduledAttempt(Answer):
    """The decision that led to an attempt, null where none is recorded, and what was found. At most six candidates are."""

    attempt: int
    started_at: AwareDatetime
    worker: str
    prompt_tokens: int | None = Field(description="Null before the attempt has ended, or where it gave no answer.")
    cached_tokens: int | None = Field(description="Of these, those that were found in the KV cache.")
    expected_tokens: int | None = Field(description="Tokens of the profile that were expected there.")
    strategy: Strategy | None
    batch: int | None = Field(description="How many requests the worker took together.")
    chosen: int | None = Field(description="Which of the candidates this is, from 0.")
    candidates: list[Candidate]


class Schedule(Answer):
    """A request's attempts."""

    data: list[ScheduledAttempt]
