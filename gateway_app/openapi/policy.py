"""`/v1/policy`: the operations on an organization's policy."""

from __future__ import annotations

from gateway_app.api.policy import PolicyBody, PolicyQuery
from gateway_app.openapi.answers.policy import Policy, PolicyPage
from gateway_app.openapi.operation import READS_JSON, Operation, Reply
from gateway_app.openapi.requests import ChangeHeaders
from tasks.errors import AdminRequired, InvalidRequest, PolicyConflict, PreconditionRequired, UnknownPolicy

OPERATIONS = (
    Operation(
        "get",
        "/v1/policy",
        "getPolicy",
        "policy",
        "Show the policy in force",
        {200: Reply("The newest version.", Policy, headers=("ETag",))},
    ),
    Operation(
        "put",
        "/v1/policy",
        "changePolicy",
        "policy",
        "Put a policy into force",
        {200: Reply("It is in force; if it was before, there is no new version.", Policy, headers=("ETag",))},
        errors=(*READS_JSON, AdminRequired, UnknownPolicy, PolicyConflict, PreconditionRequired),
        description="Wants an admin key. Every gateway process decides by it within a second, and what waits in the "
        "queue is checked against it before it runs. The change is in the audit.",
        body=PolicyBody,
        bodies={"residency": {"policy": "enterprise_residency", "detection": "raise", "reason": "New contract."}},
        headers=ChangeHeaders,
    ),
    Operation(
        "get",
        "/v1/policy/versions",
        "listPolicyVersions",
        "policy",
        "List the versions, the newest first",
        {200: Reply("A page of them.", PolicyPage)},
        errors=(InvalidRequest,),
        query=PolicyQuery,
    ),
)
