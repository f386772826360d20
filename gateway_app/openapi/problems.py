"""Errors in the document: problem details on the native paths, OpenAI's error object on OpenAI's.

An answer's schema allows exactly the codes that its operation can answer with, each with an example that holds its
message and hint.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from gateway_app.api.problems import describe
from gateway_app.openai.errors import PATHS, error_object
from gateway_app.openapi.operation import Answer, Errors, sometimes
from tasks.errors import GatewayError, MethodNotAllowed, Unauthenticated
from tasks.governance.secure_gateway import Veto

EXAMPLE_ID = "gw_019d0c3a5b7e7c21a4f06d1e8b3c9f52"


class FieldProblem(Answer):
    """What is wrong with one field of the request; nothing of what was sent is repeated."""

    field: str
    message: str


class Extensions(Answer):
    """What some errors say beside code, detail and hint."""

    errors: list[FieldProblem] = sometimes("Each field that is wrong.")
    veto: Veto = sometimes("Why governance refused, as MetaQore's audit trail holds it.")
    agents: list[str] = sometimes("The names there are.")
    prompt_tokens: int = sometimes()
    context_window: int = sometimes("The model's, in tokens.")
    setting: str = sometimes("The setting that would allow it.")
    limit: int = sometimes("How many there may be.")
    policy_version: int = sometimes("The version of the policy that is in force.")
    newest_version: int = sometimes("The newest version of the profile.")


class Problem(Extensions):
    """Problem details, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str
    retryable: bool
    request_id: str = sometimes("The request that this is about; one that was refused is in the audit under it.")
    param: str = sometimes("The parameter that this is about.")


class OpenAIErrorBody(Extensions):
    """What OpenAI's clients read of an error, and more."""

    message: str
    type: str
    param: str | None
    code: str
    hint: str
    retryable: bool
    request_id: str | None


class OpenAIError(Answer):
    """OpenAI's error object."""

    error: OpenAIErrorBody


class ErrorAnswers:
    """The error answers of the whole document: each is a component, shared by all operations that can give it."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, Any]] = {}

    def of(self, path: str, errors: Errors) -> dict[str, dict[str, str]]:
        """Return a reference to the answer on `path` for each status of `errors`."""
        openai = path.startswith(PATHS)
        found = {}
        for status in sorted({error.status for error in errors}):
            kinds = [error for error in errors if error.status == status]
            name = ".".join(["openai"] * openai + sorted(kind.code for kind in kinds))
            if name not in self.answers:
                self.answers[name] = _response(kinds, openai=openai)
            found[str(status)] = {"$ref": f"#/components/responses/{name}"}
        return found


def _response(kinds: list[type[GatewayError]], *, openai: bool) -> dict[str, Any]:
    """Return the answer of errors that share a status."""
    codes: dict[str, Any] = {"properties": {"code": {"enum": [kind.code for kind in kinds]}}}
    narrowed = {"properties": {"error": codes}} if openai else codes
    model = OpenAIError if openai else Problem
    headers = {"x-should-retry": {"$ref": "#/components/headers/x-should-retry"}} if openai else {}
    for kind in kinds:
        wanted = {
            "Retry-After": kind.retry_after_s is not None,
            "WWW-Authenticate": issubclass(kind, Unauthenticated),
            "Allow": issubclass(kind, MethodNotAllowed),
            "Upgrade": kind.status == HTTPStatus.UPGRADE_REQUIRED,
        }
        headers |= {name: {"$ref": f"#/components/headers/{name}"} for name, there in wanted.items() if there}
    return {
        "description": "\n".join(f"- `{kind.code}`: {kind.title()} {kind.hint}" for kind in kinds),
        "headers": headers,
        "content": {
            "application/json" if openai else "application/problem+json": {
                "schema": {"allOf": [{"$ref": f"#/components/schemas/{model.__name__}"}, narrowed]},
                "examples": {kind.code: {"value": _example(kind, openai=openai)} for kind in kinds},
            }
        },
    }


def _example(kind: type[GatewayError], *, openai: bool) -> dict[str, Any]:
    error = kind()
    return error_object(error) if openai else describe(error)
