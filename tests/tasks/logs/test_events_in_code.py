"""Every event that our code logs, read from the code: constant words, and only names that may be in a line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tasks.logs.redaction import KEYS

ROOT = Path(__file__).parents[3]
MODULES = sorted(path for folder in ("gateway_app", "tasks", "worker_gpu") for path in (ROOT / folder).rglob("*.py"))
METHODS = {"debug", "info", "warning", "error", "exception", "critical"}


def calls(source: str) -> Iterator[ast.Call]:
    """Return the calls of a module's `logger`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=method)) if method in METHODS:
                yield node


def faults(source: str) -> list[str]:
    """Return what is wrong with a module's events, each with its line."""
    found = []
    for call in calls(source):
        match call.args:
            case [ast.Constant(value=str())]:
                pass
            case _:
                found.append(f"{call.lineno}: an event is one constant string")
        names = {keyword.arg for keyword in call.keywords}
        found += [f"{call.lineno}: {name} may not be in a line" for name in names - KEYS - {"exc_info"}]
    return found


def test_all_events() -> None:
    """None is put together from values, and none has a value under a name that would be refused."""
    found = {str(module.relative_to(ROOT)): faults(module.read_text("utf-8")) for module in MODULES}
    assert {module: wrong for module, wrong in found.items() if wrong} == {}


def test_what_is_found() -> None:
    """The other test would find what it looks for, and there is something to look at."""
    assert faults('logger.info(f"says {prompt}")') == ["1: an event is one constant string"]
    assert faults('logger.info("says %s", prompt)') == ["1: an event is one constant string"]
    assert faults('logger.error("it failed", prompt=text, exc_info=True)') == ["1: prompt may not be in a line"]
    assert sum(len(list(calls(module.read_text("utf-8")))) for module in MODULES) > 50
