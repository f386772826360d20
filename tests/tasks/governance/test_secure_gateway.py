"""SecureGateway's rules against MetaQore's contract, written down again here as the contract's tables."""

from __future__ import annotations

import itertools

import pytest

from tasks.errors import UnknownPolicy
from tasks.governance.secure_gateway import (
    ALIASES,
    POLICIES,
    PROVIDERS,
    classify_task,
    enforce_policy,
    recommend_provider,
    resolve_policy,
)

LOCAL, ALL = {"hmcp_gateway", "ollama"}, {"hmcp_gateway", "ollama", "openrouter"}
ALLOWED = {
    "default_local_first": {"public": ALL, "internal": ALL, "sensitive": LOCAL, "critical": LOCAL},
    "enterprise_residency": {"public": ALL, "internal": LOCAL, "sensitive": LOCAL, "critical": LOCAL},
    "compliance_local_only": {"public": LOCAL, "internal": LOCAL, "sensitive": LOCAL, "critical": LOCAL},
}


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize(
    ("agent", "task_type", "plain"),
    [
        ("coder", "chat", "public"),
        ("coder", "PLANNING", "internal"),
        ("coder", "my-State-x", "internal"),
        ("coder", "governance", "internal"),
        ("Contract-VALIDATOR", "chat", "internal"),
        ("validate", "chat", "public"),
    ],
)
def test_the_first_rule_that_applies_wins(
    flags: tuple[bool, bool, bool], agent: str, task_type: str, plain: str
) -> None:
    """Security first, then the data, then the names."""
    private, sensitive, security = flags
    expected = plain
    if private or sensitive:
        expected = "sensitive"
    if security:
        expected = "critical" if sensitive else "sensitive"
    found = classify_task(
        agent_name=agent,
        task_type=task_type,
        has_private_data=private,
        has_sensitive_data=sensitive,
        is_security_task=security,
    )
    assert found == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sensitivity", ["public", "internal", "sensitive", "critical"])
@pytest.mark.parametrize("provider", [*PROVIDERS, "elsewhere"])
def test_a_provider_needs_the_policy_and_to_be_up(policy: str, sensitivity: str, provider: str) -> None:
    """A veto names the policy, and says whether it was disallowed or only down."""
    veto = enforce_policy(provider, sensitivity, policy, PROVIDERS)  # type: ignore[arg-type]
    allowed = provider in ALLOWED[policy][sensitivity]
    assert (veto is None) == allowed
    down = enforce_policy(provider, sensitivity, policy, ())  # type: ignore[arg-type]
    assert down is not None
    reason = (
        f"Provider '{provider}' unavailable" if allowed else f"Provider '{provider}' disallowed for {sensitivity} tasks"
    )
    assert down.as_dict() == {
        "reason": reason,
        "policy_violated": policy,
        "severity": "critical",
        "details": {"policy": policy},
    }


@pytest.mark.parametrize(("alias", "policy"), [*ALIASES.items(), *zip(POLICIES, POLICIES, strict=True)])
def test_policy_names_are_forgiving(alias: str, policy: str) -> None:
    """Space around, case and hyphens do not matter."""
    assert resolve_policy(f"  {alias.upper().replace('_', '-')} ") == policy


def test_an_unknown_policy_lists_the_known_ones() -> None:
    """The error helps."""
    with pytest.raises(UnknownPolicy, match="enterprise_residency"):
        resolve_policy("lenient")


def test_providers_are_recommended_in_order() -> None:
    """The most preferred one that is allowed and up, or none."""
    assert recommend_provider("public", "default_local_first", PROVIDERS) == "hmcp_gateway"
    assert recommend_provider("public", "default_local_first", ("openrouter",)) == "openrouter"
    assert recommend_provider("critical", "default_local_first", ("openrouter",)) is None
