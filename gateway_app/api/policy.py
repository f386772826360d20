"""`/v1/policy`: which policy an organization has, since when, by whom and why; and putting another one into force."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from flask import Blueprint, Response, g, jsonify, request
from pydantic import Field, StringConstraints

from gateway_app.api import reading
from gateway_app.api.pages import listing
from gateway_app.governance.api_keys import ApiKeys
from tasks.errors import PreconditionRequired, UnknownPolicy
from tasks.governance.decision import Detection
from tasks.governance.policies import Change, Policies, PolicyVersion
from tasks.governance.secure_gateway import resolve_policy
from tasks.job import Frozen

#: As many as a version can have: the column is a 32-bit integer.
MAX_VERSION = 2**31 - 1
Reason = Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]


class PolicyBody(Frozen):
    """What is to hold from now on."""

    policy: str = Field(
        min_length=1,
        max_length=200,
        description="A policy's name or alias; case and surrounding space do not matter, and `-` equals `_`.",
        examples=["enterprise_residency"],
    )
    detection: Detection | None = Field(
        default=None, description="What is done about private or sensitive data that is found; left out, as before."
    )
    reason: Reason | None = Field(default=None, description="Why, for whoever reads the record.")


class PolicyQuery(Frozen):
    """Which page of the versions a list shows, the newest first."""

    before: int | None = Field(default=None, ge=1, le=MAX_VERSION, description="The last version of the page before.")
    limit: int = Field(default=20, ge=1, le=reading.MAX_PAGE)


def blueprint(keys: ApiKeys, policies: Policies) -> Blueprint:
    """Return the routes, over what they need."""
    policy = Blueprint("policy", __name__, url_prefix="/v1/policy")

    reading.require_key(policy, keys)

    @policy.get("")
    def show() -> tuple[Response, int, dict[str, str]]:
        return _answer(policies.newest(g.caller.organization))

    @policy.put("")
    def change() -> tuple[Response, int, dict[str, str]]:
        g.caller.require_admin()
        body = reading.document(PolicyBody)
        wanted = Change(
            author=g.caller.key_id,
            policy=_full_name(body.policy),
            detection=body.detection,
            reason=body.reason,
            expected=_expected_versions(),
        )
        return _answer(policies.change(g.caller.organization, wanted))

    @policy.get("/versions")
    def versions() -> Response:
        wanted = reading.query(PolicyQuery)
        found = policies.page(g.caller.organization, wanted.before, wanted.limit + 1)
        return listing(found, wanted.limit, _document)

    return policy


def _full_name(name: str) -> str:
    try:
        return resolve_policy(name)
    except UnknownPolicy:
        # By itself it repeats what was sent, which an answer does not.
        raise UnknownPolicy from None


def _expected_versions() -> frozenset[int] | None:
    """Return the versions that If-Match allows to be replaced; None if it allows any. Raises PreconditionRequired."""
    if not request.headers.get("If-Match", "").strip():
        raise PreconditionRequired
    tags = reading.expected_tags()
    if tags is None:
        return None
    return frozenset(int(tag) for tag in tags if tag.isascii() and tag.isdigit() and len(tag) <= len(str(MAX_VERSION)))


def _answer(version: PolicyVersion) -> tuple[Response, int, dict[str, str]]:
    return jsonify(_document(version)), 200, {"ETag": f'"{version.version}"'}


def _document(version: PolicyVersion) -> dict[str, Any]:
    return {**asdict(version), "created_at": version.created_at.isoformat() if version.created_at else None}
