"""The answers of `/v1/policy`."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from gateway_app.openapi.operation import Answer
from tasks.governance.decision import Detection

PolicyName = Literal["default_local_first", "enterprise_residency", "compliance_local_only"]


class Policy(Answer):
    """A version of an organization's policy. Version 0 is the gateway's setting, which nobody made."""

    version: int
    policy: PolicyName
    detection: Detection
    created_at: AwareDatetime | None
    created_by: str | None = Field(description="The id of the API key, or `cli`.")
    reason: str | None


class PolicyPage(Answer):
    """Versions, the newest first."""

    data: list[Policy]
    has_more: bool
