"""The answers of `/v1/files` and `/v1/batches`, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Literal

from gateway_app.openapi.answers.chat import CachedTokens
from gateway_app.openapi.operation import Answer

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class File(Answer):
    """A file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


class FilePage(Answer):
    """Files."""

    object: Literal["list"]
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(Answer):
    """It is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchError(Answer):
    """What is wrong with a line of the input."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(Answer):
    """What is wrong with the input."""

    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(Answer):
    """How many of the lines have ended, and how."""

    total: int
    completed: int
    failed: int


class ReasoningTokens(Answer):
    """How much of the output was reasoning."""

    reasoning_tokens: int


class BatchUsage(Answer):
    """Token counts of all lines together."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class Batch(Answer):
    """A batch; instants are in seconds since the Unix epoch, null until they come."""

    id: str
    object: Literal["batch"]
    endpoint: Literal["/v1/chat/completions", "/v1/responses"]
    errors: BatchErrors | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None


class BatchPage(Answer):
    """Batches, the newest first."""

    object: Literal["list"]
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
