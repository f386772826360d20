"""Parameters that no model reads: paths, and the queries and headers that the code takes apart itself."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gateway_app.api.reading import MAX_KEY_LENGTH
from gateway_app.openai.governance import HEADER_PREFIX, GovernanceFields
from gateway_app.profiles.drafts import MAX_VERSION
from tasks.ids import PATTERN

CURSOR = r"^[0-9]{1,10}-[0-9]{1,15}$"
#: An empty one is the start.
_CURSOR_OR_NONE = r"^([0-9]{1,10}-[0-9]{1,15})?$"
_FLAG = "`true` or `false`; `1`, `yes` and `on` mean true as well, `0`, `no` and `off` false."
_REQUEST = {"description": "A request's id.", "schema": {"type": "string", "pattern": f"^{PATTERN}$"}}
PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "request_id": _REQUEST,
    "response_id": _REQUEST,
    "agent": {
        "description": "An agent's name.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": r"^[^\x00-\x1f\x7f/]+$"},
    },
    "number": {
        "description": "A version's number.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_VERSION},
    },
    "file_id": {"description": "A file's id.", "schema": {"type": "string", "pattern": "^file-[0-9a-f]{32}$"}},
    "batch_id": {"description": "A batch's id.", "schema": {"type": "string", "pattern": "^batch_[0-9a-f]{32}$"}},
    "name": {
        "description": "An agent, or the served model; it may hold slashes.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": r"^[^\x00-\x1f\x7f]+$"},
    },
}


class Sent(BaseModel):
    """Base of these models."""

    model_config = ConfigDict(populate_by_name=True)


class IdempotencyHeaders(Sent):
    """Which request this is."""

    idempotency_key: str = Field(
        default="",
        alias="Idempotency-Key",
        min_length=1,
        max_length=MAX_KEY_LENGTH,
        pattern=r"^[ -~]*[!-~][ -~]*$",
        description="The same key with the same body, within a day, answers with the earlier request.",
    )


class EventQuery(Sent):
    """Where a stream is read from."""

    cursor: str = Field(
        default="",
        pattern=_CURSOR_OR_NONE,
        description="The `id` of the last event you have; left out, from the start.",
    )


class EventHeaders(Sent):
    """Where a browser goes on reading."""

    last_event_id: str = Field(
        default="",
        alias="Last-Event-ID",
        pattern=_CURSOR_OR_NONE,
        description="As `cursor`, which it overrides; browsers send it by themselves.",
    )


class MatchHeaders(Sent):
    """Which state a change is made to."""

    if_match: str = Field(
        default="", alias="If-Match", min_length=1, description="The ETag of the profile as you read it, or `*`."
    )


class ChangeHeaders(Sent):
    """Which version a change replaces."""

    if_match: str = Field(
        alias="If-Match", min_length=1, description="The ETag of what you read, or `*` for whatever is in force."
    )


class ChatHeaders(IdempotencyHeaders, GovernanceFields):
    """Which request this is, and what governance reads of it; the keys of `metadata` say the same."""

    model_config = ConfigDict(alias_generator=lambda name: HEADER_PREFIX + name.replace("_", "-").title())

    has_private_data: bool = Field(default=False, description=_FLAG)
    has_sensitive_data: bool = Field(default=False, description=_FLAG)
    is_security_task: bool = Field(default=False, description=_FLAG)
