"""The governance fields of a request that comes through OpenAI's API: headers first, then `metadata`.

A header that starts with `X-MetaQore-` and is none of these is refused, since a mistyped one would otherwise lower a
request's sensitivity without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field

from gateway_app.api.reading import validate
from tasks.errors import InvalidRequest
from tasks.job import Frozen, Instant, Name, Priority

HEADER_PREFIX = "X-MetaQore-"
#: What OpenAI's service tiers mean here.
TIERS: dict[str, Priority] = {"auto": "normal", "default": "normal", "flex": "low", "priority": "high"}
#: The tier an answer names; of the two that mean normal it is the last, `default`.
TIER_OF = {priority: tier for tier, priority in TIERS.items()}
#: The fields that may also be keys of `metadata`. Its other keys are the caller's own.
IN_METADATA = (
    *("task_type", "project_id", "artifact_id", "task_id", "provider_hint"),
    *("has_private_data", "has_sensitive_data", "is_security_task"),
)


class GovernanceFields(Frozen):
    """What governance reads of a request, from text."""

    task_type: Name = "chat"
    project_id: Name | None = None
    artifact_id: Name | None = None
    task_id: Name | None = None
    provider_hint: Name | None = None
    has_private_data: bool = Field(default=False, strict=False)
    has_sensitive_data: bool = Field(default=False, strict=False)
    is_security_task: bool = Field(default=False, strict=False)
    priority: Priority = "normal"
    deadline: Instant | None = None


_BY_HEADER = {f"{HEADER_PREFIX}{name.replace('_', '-')}".lower(): name for name in GovernanceFields.model_fields}


def governance_fields(headers: Iterable[tuple[str, str]], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that are given, each once. Raises InvalidRequest for a value or a header that is none."""
    given: dict[str, Any] = {name: metadata[name] for name in IN_METADATA if name in metadata}
    for header, value in headers:
        if not header.lower().startswith(HEADER_PREFIX.lower()):
            continue
        name = _BY_HEADER.get(header.lower())
        if name is None:
            known = ", ".join(f"{HEADER_PREFIX}{field.replace('_', '-').title()}" for field in _BY_HEADER.values())
            raise InvalidRequest(f"a header that starts with {HEADER_PREFIX} is none of {known}")
        given[name] = value.strip()
    fields = validate(GovernanceFields, given)
    return {name: getattr(fields, name) for name in ("task_type", *given)}


def governed(
    headers: Iterable[tuple[str, str]],
    *,
    metadata: Mapping[str, str] | None,
    user: str | None,
    priority: Priority | None,
    tier: str | None,
) -> dict[str, Any]:
    """Return the metadata, and the fields that are given, of a body that has these; its priority beats a header's.

    Raises InvalidRequest.
    """
    own = dict(metadata or {})
    fields = governance_fields(headers, own)
    if user is not None:
        own["user"] = user
    chosen = priority or (TIERS[tier] if tier else None)
    if chosen is not None:
        fields["priority"] = chosen
    return {"metadata": own, **fields}
