"""The Governance Interceptor: every task is classified and checked before anything else is done with it.

    policy in force ─▶ detection ─▶ decision (sensitivity, provider) ─▶ how its project stands ─▶ columns, or a veto

It decides from what the request says, what detection finds in it, and the policy of the caller's organization. Then, if
a MetaQore is configured and the request names a project, that project's standing is asked for; of a request that is
refused already nobody is asked. The decision becomes audit columns and details; a veto carries the same, so that a
refusal is recorded as fully.

Detection is the only part whose cost grows with the request: it runs in the request's own thread, in time linear in the
texts, which `gateway.max_body_bytes` bounds. docs/governance.md has figures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.errors import PolicyVeto, ProjectUnverified, Unsupported
from tasks.governance.decision import Facts, Found, decide, details
from tasks.governance.policies import Policies
from tasks.governance.psmp import Projects
from tasks.governance.secure_gateway import Veto
from tasks.job import TaskRequest

#: What this release runs requests on. Another provider may be up, but nothing here sends it anything.
RUNS_ON = "hmcp_gateway"


class Findings(Protocol):
    """What a scan tells."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Return how many there are of each kind that was found."""

    @property
    def private(self) -> bool:
        """Tell whether private data was found."""

    @property
    def sensitive(self) -> bool:
        """Tell whether sensitive data was found."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What governance decided: `columns` are for the audit event, `veto` is set if the task is refused.

    `retryable` tells that it is refused only because nobody could say how its project stands.
    """

    columns: dict[str, Any]
    veto: Veto | None = None
    retryable: bool = False

    def enforce(self) -> None:
        """Raise what the caller is answered if the task is not to run: PolicyVeto with the veto object, Unsupported."""
        if self.veto is not None:
            kind = ProjectUnverified if self.retryable else PolicyVeto
            raise kind(self.veto.reason, veto=self.veto.as_dict())
        if self.columns["provider"] != RUNS_ON:
            raise Unsupported(
                f"this release runs requests on {RUNS_ON} alone",
                param="provider_hint",
                hint="Leave provider_hint out; nothing is sent to another provider.",
            )


class GovernanceInterceptor:
    """Decides about tasks. `available` are the providers that are up; `projects` is None if no MetaQore is asked.

    `scan` looks for private and sensitive data in a task's texts.
    """

    def __init__(
        self,
        policies: Policies,
        available: Collection[str],
        scan: Callable[[TaskRequest], Findings],
        projects: Projects | None,
    ) -> None:
        self._policies = policies
        self._available = frozenset(available)
        self._scan = scan
        self._projects = projects

    def decide(self, organization: str, task: TaskRequest, agent_name: str) -> Decision:
        """Classify the task and choose its provider. A request without an agent is judged by the model's name.

        Raises DatabaseUnavailable if the policy cannot be read.
        """
        policy = self._policies.current(organization)
        found = None if policy.detection == "off" else _found(self._scan(task))
        facts = Facts(
            agent_name=agent_name,
            task_type=task.task_type,
            private=task.has_private_data,
            sensitive=task.has_sensitive_data,
            security=task.is_security_task,
            provider_hint=task.provider_hint,
            found=found,
        )
        ruling = decide(facts, policy.policy, policy.detection, self._available)
        held = details(facts, policy.detection, policy.version)
        veto, by, retryable = ruling.veto, ruling.vetoed_by, False
        if veto is None and self._projects is not None:
            standing = self._projects.standing(
                project_id=task.project_id, artifact_id=task.artifact_id, task_id=task.task_id, agent_name=agent_name
            )
            if standing is not None:
                held["psmp"] = standing.context
                if standing.veto is not None:
                    veto, by, retryable = standing.veto, "project", standing.retryable
        if veto is not None:
            held |= {"veto": veto.as_dict(), "vetoed_by": by}
        columns = {
            "agent_name": agent_name,
            "task_type": task.task_type,
            "sensitivity": ruling.sensitivity,
            "provider": ruling.provider,
            "policy": policy.policy,
            "reason": veto.reason if veto else ruling.reason,
            "project_id": task.project_id,
            "artifact_id": task.artifact_id,
            "task_id": task.task_id,
            "details": held,
        }
        return Decision(columns, veto, retryable)


def _found(findings: Findings) -> Found:
    return Found(findings.counts, findings.private, findings.sensitive)
