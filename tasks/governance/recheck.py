"""A second look at a request when it leaves the queue, before the engine sees it.

A request may have waited for long, and what was true when it was admitted may be so no longer: its key was revoked, its
organization's policy forbids now what was decided then, its project is blocked. The decision is made again from the
facts that the `admitted` event holds, under the policy in force this moment.

One query reads the facts, the key and the policy; none is cached, since that is what this look is for. It runs in the very
transaction that starts the request. Where projects are asked about, the look is made before it too, and the project asked
about in between, so that no transaction waits for another server. Whatever changes after this look changes a running request, which nothing here stops.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.db import Database
from tasks.db_statements import Statement
from tasks.errors import KeyRevoked, PolicyVeto, ProjectUnverified
from tasks.governance.decision import Detection, VetoedBy, decide, details, facts_of
from tasks.governance.policies import PolicyVersion
from tasks.governance.psmp import Projects
from tasks.governance.secure_gateway import PROVIDERS, Veto, enforce_policy
from tasks.lifecycle import Refusal
from tasks.schema import api_keys, audit_events, requests
from tasks.schema_governance import policies

_NEWEST = (
    sa.select(sa.func.max(policies.c.version))
    .where(policies.c.organization == audit_events.c.organization)
    .correlate(audit_events)
    .scalar_subquery()
)
_EVENT = ("agent_name", "task_type", "sensitivity", "provider", "project_id", "artifact_id", "task_id", "details")
_QUERY = Statement(
    sa.select(
        *(audit_events.c[name] for name in _EVENT),
        (api_keys.c.key_id.is_not(None) & api_keys.c.revoked_at.is_(None)).label("key_in_use"),
        policies.c.version.label("policy_version"),
        policies.c.policy.label("policy_name"),
        policies.c.detection.label("policy_detection"),
    )
    .select_from(requests)
    .join(audit_events, audit_events.c.request_id == requests.c.request_id)
    .outerjoin(api_keys, api_keys.c.key_id == requests.c.api_key_id)
    .outerjoin(policies, (policies.c.organization == audit_events.c.organization) & (policies.c.version == _NEWEST))
    .where(
        requests.c.request_id == sa.bindparam("request_id"),
        audit_events.c.request_id == sa.bindparam("request_id"),
        # As a literal: SQLite plans a query anew each time a parameter of it could choose among its partial indices.
        audit_events.c.kind == sa.literal_column("'admitted'"),
        audit_events.c.attempt == 0,
        requests.c.finished_at.is_(None),
    )
)


class Recheck:
    """Looks at requests again. `default` is the policy of organizations that have set none."""

    def __init__(self, database: Database, default: PolicyVersion, projects: Projects | None) -> None:
        self._database = database
        self._default = default
        self._projects = projects

    @property
    def asks_projects(self) -> bool:
        """Tell whether requests' projects are asked about: without, `by_record` says all that there is to say."""
        return self._projects is not None

    def by_record(self, connection: Connection, request_id: str) -> Refusal | None:
        """Return why the record and the rules in force forbid the request to run, in the caller's transaction."""
        row: Row[Any] | None = _QUERY.one_or_none(connection, {"request_id": request_id})
        return None if row is None else self._by_key(row) or self._by_policy(row)

    def refusal(self, request_id: str) -> Refusal | None:
        """Return why the request must not run any more, or None if it may, or has ended. Raises DatabaseUnavailable.

        Blocks for one query, and for as long as `Projects` may where the request names a project.
        """
        row = self._database.row(_QUERY, {"request_id": request_id})
        return None if row is None else self._by_key(row) or self._by_policy(row) or self._by_project(row)

    def _by_key(self, row: Row[Any]) -> Refusal | None:
        return None if row.key_in_use else Refusal("failed", KeyRevoked.code, {})

    def _by_policy(self, row: Row[Any]) -> Refusal | None:
        policy, detection = self._in_force(row)
        facts = facts_of(row)
        if facts is None:
            # Admitted by a release that did not record the facts: what it made of them still tells what is allowed.
            if row.sensitivity is None or row.provider is None:
                return None
            veto = enforce_policy(row.provider, row.sensitivity, policy, PROVIDERS)
            return None if veto is None else _vetoed(row, policy, row.sensitivity, veto, "policy", row.details or {})
        # The provider is the one that was decided on. It is up: this is asked by one of its workers.
        ruling = decide(replace(facts, provider_hint=row.provider), policy, detection, PROVIDERS)
        if ruling.veto is None:
            return None
        held = details(facts, detection, self._version(row))
        return _vetoed(row, policy, ruling.sensitivity, ruling.veto, ruling.vetoed_by or "policy", held)

    def _by_project(self, row: Row[Any]) -> Refusal | None:
        if self._projects is None or row.project_id is None:
            return None
        standing = self._projects.standing(
            project_id=row.project_id, artifact_id=row.artifact_id, task_id=row.task_id, agent_name=row.agent_name
        )
        if standing is None or standing.veto is None:
            return None
        held = {**(row.details or {}), "policy_version": self._version(row), "psmp": standing.context}
        code = ProjectUnverified.code if standing.retryable else PolicyVeto.code
        return _vetoed(row, self._in_force(row)[0], row.sensitivity, standing.veto, "project", held, code)

    def _in_force(self, row: Row[Any]) -> tuple[str, Detection]:
        if row.policy_version is None:
            return self._default.policy, self._default.detection
        return row.policy_name, row.policy_detection

    def _version(self, row: Row[Any]) -> int:
        return int(row.policy_version or 0)


def _vetoed(
    row: Row[Any],
    policy: str,
    sensitivity: str,
    veto: Veto,
    by: VetoedBy,
    held: dict[str, Any],
    code: str = PolicyVeto.code,
) -> Refusal:
    """Return a veto as the gateway would have recorded it."""
    columns = {name: getattr(row, name) for name in ("task_type", "provider", "project_id", "artifact_id", "task_id")}
    decided = {"sensitivity": sensitivity, "policy": policy, "reason": veto.reason}
    return Refusal(
        "vetoed",
        code,
        {**columns, **decided, "details": {**held, "veto": veto.as_dict(), "vetoed_by": by}},
    )
