"""MetaQore's SecureGateway once more, written from its contract alone: what a request must be answered.

Nothing here imports the gateway's own rules. The tables of names say by hand what Python's `str.lower` makes of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

#: The contract's names, with their aliases.
POLICIES = {
    "default_local_first": ("default", "local_first"),
    "enterprise_residency": ("enterprise", "residency"),
    "compliance_local_only": ("compliance", "local_only"),
}
PRIORITY = ("hmcp_gateway", "ollama", "openrouter")
CLOUD = "openrouter"

#: Agents by name, and whether MetaQore finds `validator` in it: it is a Python program, so `str.lower` says.
AGENTS = {
    "coder": False,
    "contract-validator": True,
    "VALIDATOR": True,
    "VaLiDaToR-7": True,
    "преvalidatorы": True,
    "validator\u0301": True,
    "invalidators": True,
    "VALIDATORΣ": True,
    "validate": False,
    "valid ator": False,
    "planner": False,
    "state-governance": False,
    "VAL\u0130DATOR": False,  # with a dot above: its lower case is two characters
    "val\u0131dator": False,  # without a dot
    "validat\u03bfr": False,  # a Greek o
    "\uff56\uff41\uff4c\uff49\uff44\uff41\uff54\uff4f\uff52": False,  # full-width letters
    "vali\u200bdator": False,
    "vali\u00addator": False,
}
#: Task types, and whether `plan`, `state` or `governance` is found in it.
TASK_TYPES = {
    "task": False,
    "chat": False,
    "plan": True,
    "PLAN": True,
    "Explanation": True,
    "my-State-x": True,
    "ESTATE": True,
    "GoVeRnAnCe": True,
    "governance review": True,
    "\u039f\u0394\u039f\u03a3-PLAN": True,  # a sigma at the end of a word has a lower case of its own
    "plan\u0301": True,
    "🗺️PLAN🗺️": True,
    "validator": False,
    "govern": False,
    "p l a n": False,
    "\u017ftate": False,  # a long s is not lowered to s, only folded
    "\ufb06ate": False,  # nor is the ligature of s and t
    "\uff30\uff2c\uff21\uff2e": False,  # full-width letters
    "PL\u0391N": False,  # a Greek A
    "pl\u200ban": False,
    "STAT\u0415": False,  # a Cyrillic E
}


@dataclass(frozen=True)
class Case:
    """One request."""

    agent: str = "coder"
    task_type: str = "task"
    private: bool = False
    sensitive: bool = False
    security: bool = False
    hint: str | None = None

    def body(self) -> dict[str, Any]:
        """Return it as the API takes it."""
        flags = {
            "has_private_data": self.private,
            "has_sensitive_data": self.sensitive,
            "is_security_task": self.security,
        }
        named = {} if self.hint is None else {"provider_hint": self.hint}
        return {"agent": self.agent, "task_type": self.task_type, "directive": "Go on.", **flags, **named}


@dataclass(frozen=True)
class Ruled:
    """What the contract says of a request. `refused` is None, or a veto's reason."""

    sensitivity: str
    provider: str
    reason: str
    refused: str | None


def oracle(case: Case, policy: str, up: Iterable[str]) -> Ruled:
    """Return what the contract says."""
    if case.security and case.sensitive:
        sensitivity = "critical"
    elif case.security or case.sensitive or case.private:
        sensitivity = "sensitive"
    elif TASK_TYPES[case.task_type] or AGENTS[case.agent]:
        sensitivity = "internal"
    else:
        sensitivity = "public"
    cloud_too = {
        "default_local_first": {"public", "internal"},
        "enterprise_residency": {"public"},
        "compliance_local_only": set[str](),
    }[policy]
    allowed = [name for name in PRIORITY if name != CLOUD or sensitivity in cloud_too]
    usable = [name for name in allowed if name in up]
    if case.hint is None:
        if usable:
            return Ruled(sensitivity, usable[0], "auto_recommendation", None)
        # Nothing to recommend: the most preferred is the one reported.
        return Ruled(sensitivity, PRIORITY[0], "", f"Provider '{PRIORITY[0]}' unavailable")
    if case.hint not in allowed:
        return Ruled(sensitivity, case.hint, "", f"Provider '{case.hint}' disallowed for {sensitivity} tasks")
    if case.hint not in usable:
        return Ruled(sensitivity, case.hint, "", f"Provider '{case.hint}' unavailable")
    return Ruled(sensitivity, case.hint, "allowed", None)
