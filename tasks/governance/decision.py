"""One decision about one request: from what is known of it, and the policy in force, to a provider or a veto.

    facts ─▶ what detection found raises the flags, if the mode says so ─▶ classify_task ─▶ provider ─▶ veto, or none

The gateway decides so when a request arrives, a worker once more before the engine sees it, and `flask policy simulate`
over what is recorded of requests that are long gone. All three call the same function on the same facts, which an audit
event holds in its columns and in `details`: a decision can be made again from the record alone, without the prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tasks.governance.secure_gateway import (
    PROVIDERS,
    Sensitivity,
    Veto,
    classify_task,
    enforce_policy,
    recommend_provider,
)

#: What is done about private or sensitive data that is found in a request: nothing is looked for; what was found is
#: recorded; it raises the flags as if the caller had said so; it refuses the request.
Detection = Literal["off", "record", "raise", "refuse"]
#: Which rule refused a request.
VetoedBy = Literal["policy", "detection", "project"]


@dataclass(frozen=True, slots=True)
class Found:
    """What detection found in a request's texts: how many of each kind, and what these kinds mean. Never the text."""

    counts: Mapping[str, int]
    private: bool
    sensitive: bool


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a decision is made from. `found` is None if nothing was looked for."""

    agent_name: str
    task_type: str
    private: bool = False
    sensitive: bool = False
    security: bool = False
    provider_hint: str | None = None
    found: Found | None = None


@dataclass(frozen=True, slots=True)
class Ruling:
    """What was decided. `reason` is `allowed`, `auto_recommendation`, or the veto's; `vetoed_by` says which rule it was."""

    sensitivity: Sensitivity
    provider: str
    reason: str
    veto: Veto | None = None
    vetoed_by: VetoedBy | None = None


def decide(facts: Facts, policy: str, detection: Detection, available: Collection[str]) -> Ruling:
    """Return the decision. `policy` is a full name, `available` are the providers that are up."""
    found = facts.found if facts.found is not None and detection != "off" else Found({}, private=False, sensitive=False)
    raising = detection in ("raise", "refuse")
    sensitivity = classify_task(
        agent_name=facts.agent_name,
        task_type=facts.task_type,
        has_private_data=facts.private or (raising and found.private),
        has_sensitive_data=facts.sensitive or (raising and found.sensitive),
        is_security_task=facts.security,
    )
    provider, reason = facts.provider_hint, "allowed"
    if provider is None:
        provider, reason = recommend_provider(sensitivity, policy, available), "auto_recommendation"
    # With nothing to recommend, the most preferred provider is the one reported as unavailable.
    provider = provider or PROVIDERS[0]
    veto = enforce_policy(provider, sensitivity, policy, available)
    if veto is not None:
        return Ruling(sensitivity, provider, veto.reason, veto, "policy")
    if detection == "refuse" and found.counts:
        veto = _refused(found, policy)
        return Ruling(sensitivity, provider, veto.reason, veto, "detection")
    return Ruling(sensitivity, provider, reason)


def _refused(found: Found, policy: str) -> Veto:
    kinds = sorted(found.counts)
    # The column that holds it is bounded; the details have all of them.
    shown = ", ".join(kinds[:8]) + (", …" if len(kinds) > 8 else "")  # noqa: PLR2004  as many as fit
    return Veto(
        f"Detected {shown}, which this organization refuses",
        policy,
        severity="high",
        details={"policy": policy, "detected": dict(found.counts)},
    )


def details(facts: Facts, detection: Detection, policy_version: int) -> dict[str, Any]:
    """Return what an audit event's `details` hold of a decision beside its columns: see docs/governance.md."""
    held: dict[str, Any] = {
        "flags": {"private": facts.private, "sensitive": facts.sensitive, "security": facts.security},
        "policy_version": policy_version,
        "detection": detection,
    }
    if facts.provider_hint is not None:
        held["provider_hint"] = facts.provider_hint
    if facts.found is not None and facts.found.counts:
        held["detected"] = dict(facts.found.counts)
        held["detected_flags"] = {"private": facts.found.private, "sensitive": facts.found.sensitive}
    return held


def facts_of(event: Any) -> Facts | None:
    """Return the facts that an event's row holds, or None if it is of a release that did not record them.

    `event` has the attributes agent_name, task_type and details.
    """
    held = event.details or {}
    flags = held.get("flags")
    if flags is None or event.agent_name is None or event.task_type is None:
        return None
    found = None
    if held.get("detection", "off") != "off":
        meaning = held.get("detected_flags", {})
        found = Found(held.get("detected", {}), meaning.get("private", False), meaning.get("sensitive", False))
    return Facts(
        agent_name=event.agent_name,
        task_type=event.task_type,
        private=flags["private"],
        sensitive=flags["sensitive"],
        security=flags["security"],
        provider_hint=held.get("provider_hint"),
        found=found,
    )
