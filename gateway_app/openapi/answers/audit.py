"""The answers of `/v1/audit`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, Field

from gateway_app.openapi.operation import Answer, sometimes
from tasks.governance.secure_gateway import Veto

EventType = Literal[
    "received",
    "routing_decision",
    "veto",
    "started",
    "requeued",
    "completed",
    "failed",
    "cancelled",
    "expired",
    "dead",
    "policy_changed",
    "profile_changed",
]


class AuditPayload(Answer):
    """What was recorded. A routing decision and a veto have the contract's keys, null where nothing is known."""

    agent_name: str | None = sometimes()
    task_type: str | None = sometimes()
    sensitivity: str | None = sometimes()
    provider: str | None = sometimes()
    policy: str | None = sometimes("The policy that decided.")
    reason: str | None = sometimes("`allowed`, or `auto_recommendation` where the gateway picked the provider.")
    veto: Veto = sometimes("Why it was refused.")
    request_id: str
    attempt: int = Field(description="Which try of the request; 0 before any.")
    epoch: int
    api_key_id: str
    profile_version: int = sometimes()
    static_profile_hash: str = sometimes()
    project_id: str = sometimes()
    artifact_id: str = sometimes()
    task_id: str = sometimes()
    code: str = sometimes("The error's code.")
    worker: str = sometimes()
    model: str = sometimes()
    prompt_tokens: int = sometimes()
    cached_tokens: int = sometimes()
    output_tokens: int = sometimes()
    queued_ms: float = sometimes()
    prefill_ms: float = sometimes()
    first_token_ms: float = sometimes()
    total_ms: float = sometimes()
    payload_sha256: str = sometimes("Of the sealed text, in hexadecimal.")
    vetoed_by: str = sometimes("Which rule refused it.")
    flags: dict[str, Any] = sometimes("What the caller said of the task.")
    provider_hint: str = sometimes("The provider that the caller asked for.")
    policy_version: int = sometimes()
    detection: str = sometimes("What was done about private or sensitive data that was found.")
    detected: dict[str, Any] = sometimes("How much of it was found, by kind.")
    detected_flags: dict[str, Any] = sometimes("What that made of the task.")
    psmp: dict[str, Any] = sometimes("How the project stood.")
    finish_reason: str = sometimes()
    change: dict[str, Any] = sometimes("What of a policy or a profile was changed.")
    details: dict[str, Any] = sometimes()


class AuditEvent(Answer):
    """An event as MetaQore's trail has it, with its `id`."""

    id: str
    timestamp: AwareDatetime
    event_type: EventType
    organization: str
    payload: AuditPayload


class AuditPage(Answer):
    """Events, in the order that was asked for."""

    data: list[AuditEvent]
    has_more: bool
