"""MetaQore's SecureGateway rules: how sensitive a task is, and which providers may see it.

The rules are MetaQore's contract, to the letter; the gateway follows them itself so that it needs no MetaQore server.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tasks.errors import UnknownPolicy

Sensitivity = Literal["public", "internal", "sensitive", "critical"]

#: In order of preference. `hmcp_gateway` is this gateway's own GPU workers; the last one is the only cloud.
PROVIDERS = ("hmcp_gateway", "ollama", "openrouter")
_LOCAL = frozenset({"hmcp_gateway", "ollama"})
_ANY = frozenset(PROVIDERS)

POLICIES: dict[str, dict[Sensitivity, frozenset[str]]] = {
    "default_local_first": {"public": _ANY, "internal": _ANY, "sensitive": _LOCAL, "critical": _LOCAL},
    "enterprise_residency": {"public": _ANY, "internal": _LOCAL, "sensitive": _LOCAL, "critical": _LOCAL},
    "compliance_local_only": {"public": _LOCAL, "internal": _LOCAL, "sensitive": _LOCAL, "critical": _LOCAL},
}
ALIASES = {
    "default": "default_local_first",
    "local_first": "default_local_first",
    "enterprise": "enterprise_residency",
    "residency": "enterprise_residency",
    "compliance": "compliance_local_only",
    "local_only": "compliance_local_only",
}


@dataclass(frozen=True, slots=True)
class Veto:
    """Why a request is refused, as MetaQore's audit trail holds it."""

    reason: str
    policy_violated: str
    severity: Literal["low", "medium", "high", "critical"] = "critical"
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the veto object of the contract."""
        return asdict(self)


def resolve_policy(name: str) -> str:
    """Return the policy's full name. Raises UnknownPolicy, listing the known ones."""
    known = name.strip().lower().replace("-", "_")
    known = ALIASES.get(known, known)
    if known not in POLICIES:
        raise UnknownPolicy(f"no policy is named {name.strip()!r}; known are {', '.join([*POLICIES, *ALIASES])}")
    return known


def classify_task(
    *,
    agent_name: str,
    task_type: str,
    has_private_data: bool = False,
    has_sensitive_data: bool = False,
    is_security_task: bool = False,
) -> Sensitivity:
    """Return the task's sensitivity: the first rule that applies wins."""
    if is_security_task:
        return "critical" if has_sensitive_data else "sensitive"
    if has_sensitive_data or has_private_data:
        return "sensitive"
    kind = task_type.lower()
    if any(word in kind for word in ("plan", "state", "governance")):
        return "internal"
    if "validator" in agent_name.lower():
        return "internal"
    return "public"


def enforce_policy(provider: str, sensitivity: Sensitivity, policy: str, available: Collection[str]) -> Veto | None:
    """Return why `provider` may not run the task, or None if it may. `policy` is a full name."""
    if provider not in POLICIES[policy][sensitivity]:
        return Veto(f"Provider '{provider}' disallowed for {sensitivity} tasks", policy, details={"policy": policy})
    if provider not in available:
        return Veto(f"Provider '{provider}' unavailable", policy, details={"policy": policy})
    return None


def recommend_provider(sensitivity: Sensitivity, policy: str, available: Collection[str]) -> str | None:
    """Return the most preferred provider that is allowed and available, if there is one."""
    allowed = POLICIES[policy][sensitivity]
    return next((provider for provider in PROVIDERS if provider in allowed and provider in available), None)
