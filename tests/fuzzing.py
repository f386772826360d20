"""What Schemathesis must know of this gateway beside its OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, get_args

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData, Failure
from schemathesis.generation.meta import TestPhase
from schemathesis.openapi.checks import RejectedPositiveData, UseAfterFree

from tasks.prompts.profile import SegmentKind

#: Refusals of what is well-formed, and too much for this model or too late. No schema can say it.
NOT_OF_FORM = {
    *("invalid_cursor", "prompt_too_long", "deadline_passed", "template_refused", "unsupported", "profile_unusable"),
    # A base must be there; and whoever writes YAML may write as an alias what comes twice.
    *("base_unusable", "invalid_yaml"),
    *("unknown_policy", "policy_conflict"),
}
#: Parameters that must fit others, or what there is, in a way that no schema can say.
TOGETHER = {"tools", "tool_choice", "starting_after", "after"}
IDEMPOTENCY_KEY = "Idempotency-Key"
AGENT = "incident-responder"
LATER = "2100-01-01T00:00:00Z"
#: What is put in the place of a generated value, by its name.
DEEPER = {
    "agent": AGENT,
    "model": AGENT,
    "deadline": LATER,
    "provider_hint": "hmcp_gateway",
    "arguments": '{"x": 1}',
    "X-MetaQore-Provider-Hint": "hmcp_gateway",
    "X-MetaQore-Deadline": LATER,
    "If-Match": "*",
}


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext, failure: Failure, case: schemathesis.Case[Any], response: schemathesis.Response
) -> bool:
    """Drop what is no fault: see below."""
    error, path = error_of(response), str(case.operation.path)
    if error.get("code") == "upgrade_required":
        # Schemathesis speaks plain HTTP, and whatever it says a socket is not opened.
        return False
    if isinstance(failure, UseAfterFree):
        # To delete a task is to cancel it.
        return not path.startswith("/v1/tasks/")
    if isinstance(failure, AcceptedNegativeData):
        # Whatever a form's field was made as, it is sent as text.
        return path != "/v1/files"
    if isinstance(failure, RejectedPositiveData):
        fields = {error.get("param"), *(problem["field"] for problem in error.get("errors", ()))}
        return error.get("code") not in NOT_OF_FORM and not fields & TOGETHER
    return True


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Let valid cases further in: with an agent that there is, a provider that is allowed, time to answer."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    tried = getattr(case.meta.phase.data, "parameter", None)
    if tried != IDEMPOTENCY_KEY:
        # The same key with every body would only find conflicts.
        case.headers.pop(IDEMPOTENCY_KEY, None)
    for header in set(case.headers) & DEEPER.keys() - {tried}:
        case.headers[header] = DEEPER[header]
    if str(case.operation.path) == "/v1/policy" and isinstance(case.body, dict):
        # Any text may be a name, and three are.
        case.body = {**case.body, "policy": "default"}
    if isinstance(case.body, dict):
        # To name an agent that there is would make no new one, and would hide what coverage tries.
        as_it_is = case.meta.phase.name is TestPhase.COVERAGE or str(case.operation.path).startswith("/v1/profiles")
        case.body = called(in_order(whole(case.body, {} if as_it_is else DEEPER)))


def whole(value: Any, known: Mapping[str, str]) -> Any:
    """Return a valid body with whole numbers as such, since JSON Schema takes 1.0 for one, and with what is known."""
    if isinstance(value, list):
        return [whole(item, known) for item in value]
    if isinstance(value, dict):
        return {name: item if item is None else known.get(name, whole(item, known)) for name, item in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def in_order(body: dict[str, Any]) -> dict[str, Any]:
    """Return a profile with its segments in the order that is wanted."""
    kinds = get_args(SegmentKind)
    if "segments" not in body:
        return body
    return {**body, "segments": sorted(body["segments"], key=lambda segment: kinds.index(segment["kind"]))}


def called(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body with a call before all outputs of calls."""
    items = body.get("input")
    if not isinstance(items, list):
        return body
    outputs = [item for item in items if item.get("type") == "function_call_output"]
    calls = [{"type": "function_call", "call_id": item["call_id"], "name": "f", "arguments": "{}"} for item in outputs]
    return {**body, "input": [*calls, *items]}


def error_of(response: schemathesis.Response) -> dict[str, Any]:
    """Return a problem document, or what is in OpenAI's error object."""
    try:
        answer = json.loads(response.content)
    except ValueError:
        return {}
    inner = answer.get("error", answer) if isinstance(answer, dict) else {}
    return inner if isinstance(inner, dict) else {}
