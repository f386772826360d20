"""The Governance Interceptor: every task is classified and checked before anything else is done with it.

It decides from what the request says and the policy in force: sensitivity by `classify_task`, then the provider, the
caller's own choice if the policy allows it, else the most preferred one. The decision, with the PSMP context the
request named, becomes audit columns; a veto carries the same, so that a refusal is recorded as fully.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gateway_app.governance.secure_gateway import (
    PROVIDERS,
    Veto,
    classify_task,
    enforce_policy,
    recommend_provider,
    resolve_policy,
)
from tasks.errors import PolicyVeto
from tasks.job import TaskRequest


@dataclass(frozen=True, slots=True)
class Decision:
    """What governance decided: `columns` are for the audit event, `veto` is set if the task is refused."""

    columns: dict[str, Any]
    veto: Veto | None

    def enforce(self) -> None:
        """Raise PolicyVeto, carrying the veto object, if the task is refused."""
        if self.veto is not None:
            raise PolicyVeto(self.veto.reason, veto=self.veto.as_dict())


class GovernanceInterceptor:
    """Applies one policy. Raises UnknownPolicy when made with a name that is none."""

    def __init__(self, policy: str, available: Collection[str]) -> None:
        self._policy = resolve_policy(policy)
        self._available = frozenset(available)

    def decide(self, task: TaskRequest, agent_name: str) -> Decision:
        """Classify the task and choose its provider. A request without an agent is judged by the model's name."""
        sensitivity = classify_task(
            agent_name=agent_name,
            task_type=task.task_type,
            has_private_data=task.has_private_data,
            has_sensitive_data=task.has_sensitive_data,
            is_security_task=task.is_security_task,
        )
        provider, reason = task.provider_hint, "allowed"
        if provider is None:
            provider, reason = recommend_provider(sensitivity, self._policy, self._available), "auto_recommendation"
        # With nothing to recommend, the most preferred provider is the one reported as unavailable.
        provider = provider or PROVIDERS[0]
        veto = enforce_policy(provider, sensitivity, self._policy, self._available)
        columns = {
            "agent_name": agent_name,
            "task_type": task.task_type,
            "sensitivity": sensitivity,
            "provider": provider,
            "policy": self._policy,
            "reason": veto.reason if veto else reason,
            "project_id": task.project_id,
            "artifact_id": task.artifact_id,
            "task_id": task.task_id,
        }
        return Decision(columns, veto)
