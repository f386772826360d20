"""docs/errors.md, written from the error tree: `python -m gateway_app.openapi.error_page`; a test tells when to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from gateway_app.openapi.document import OPERATIONS
from tasks.errors import GatewayError, MethodNotAllowed, NotFound

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
_HEAD = """\
# Errors

Written by `python -m gateway_app.openapi.error_page` from the error tree.

Every error has a stable `code`, which never changes its meaning, a message in `detail`, which may be more exact than the
one below, and a `hint`. `retryable` tells whether the same request may succeed later. The native API answers with
problem details (RFC 9457, `application/problem+json`), the paths of OpenAI's API with OpenAI's error object; codes,
hints and statuses are the same. Those with a status of 5xx or 429 may come with `Retry-After`, in seconds. A failed
task's `error`, and the last event of its stream, name the same codes.

## Answers of the API

"""
_ELSEWHERE = """
## At the start, in logs and in the audit

"""
_COLUMNS = "| code | status | message | what to do | retry |\n|---|---|---|---|---|\n"


def page() -> str:
    """Return the page."""
    answered: set[type[GatewayError]] = {MethodNotAllowed, NotFound}
    for operation in OPERATIONS:
        answered.update(operation.all_errors, operation.late_errors)
    elsewhere = set(tree(GatewayError)) - answered
    return _HEAD + _table(answered) + _ELSEWHERE + _table(elsewhere)


def tree(root: type[GatewayError]) -> Iterator[type[GatewayError]]:
    """Yield the classes of our own under `root`, itself included."""
    if root.__module__.startswith(("tasks.", "gateway_app.")):
        yield root
    for kind in root.__subclasses__():
        yield from tree(kind)


def _table(errors: Iterable[type[GatewayError]]) -> str:
    # A kind of error that has no code of its own is told apart by its detail alone.
    rows = sorted((error for error in errors if "code" in vars(error)), key=lambda error: (error.status, error.code))
    return _COLUMNS + "".join(
        f"| `{error.code}` | {error.status} | {error.title()} | {error.hint} | {'yes' if error.retryable else 'no'} |\n"
        for error in rows
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
