"""Calls of tools as plain JSON: how any model is made to call, whatever it was trained to write.

The answer is constrained to a schema that is made of the tools' own. Where one function is named, the answer is its
arguments. Where any call is required, it is an array of {"name": …, "parameters": …}, in this order. As the form is
ours, reading it back needs no parser of the model's: `ArrayOfCalls` looks at each character once, so that a long call
is not scanned again with every token, and passes arguments on as they come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tasks.errors import Unsupported
from tasks.job import FinishReason, ToolUse
from worker_gpu.engines.schema_limits import NAMED_SCHEMAS, SCHEMA, SCHEMAS, checked_text, schema_text
from worker_gpu.engines.tool_reading import CallPart, Source
from worker_gpu.engines.vllm_sampling import Constraint

#: What stands before a call's arguments.
HEAD = re.compile(r'[\s\[,]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:')
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def json_form(tools: ToolUse) -> tuple[Constraint, Callable[[], Source]]:
    """Return what forces a call, and what makes a source for each choice.

    Raises Unsupported if the choice names none of the tools, or if a function that is marked as `strict` has a schema
    that could not be followed to the letter; the others' are followed as far as xgrammar does.
    """
    functions = [tool["function"] for tool in tools.tools]
    if tools.choice == "required":
        return Constraint("json", schema_text(_array_schema(functions, tools.parallel), "tools")), ArrayOfCalls
    function = chosen(tools)
    return Constraint("json", _schema_text(function)), partial(NamedCall, str(function["name"]))


def chosen(tools: ToolUse) -> Mapping[str, Any]:
    """Return the function that `choice` names. Raises Unsupported if there is none of that name."""
    name = tools.choice.removeprefix("function:")
    for tool in tools.tools:
        function: Mapping[str, Any] = tool["function"]
        if function.get("name") == name:
            return function
    raise Unsupported("tool_choice names a function that is none of the tools", param="tool_choice")


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a function's arguments; without one it takes none."""
    schema: Mapping[str, Any] = function.get("parameters") or NO_PARAMETERS
    return schema


def _schema_text(function: Mapping[str, Any]) -> str:
    return (checked_text if function.get("strict") else schema_text)(_parameters(function), "tools")


def _array_schema(functions: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
    # Each tool's schema becomes a definition of its own, with its references led there, so that definitions of the
    # same name in two tools do not meet.
    definitions: dict[str, Any] = {}
    items: list[dict[str, Any]] = []
    for index, function in enumerate(functions):
        _schema_text(function)
        definitions[f"tool{index}"] = _moved(_parameters(function), place := f"#/$defs/tool{index}")
        items.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "parameters": {"$ref": place}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    limit = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **limit, "items": {"anyOf": items}, "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema whose references from its root lead to `place`, where it now lies."""
    if not isinstance(schema, Mapping):
        return schema
    moved = dict(schema)
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in SCHEMA:
            moved[key] = _moved(value, place)
        elif key in SCHEMAS and isinstance(value, list):
            moved[key] = [_moved(one, place) for one in value]
        elif key in NAMED_SCHEMAS and isinstance(value, Mapping):
            moved[key] = {name: _moved(one, place) for name, one in value.items()}
    return moved


class NamedCall:
    """Reads an answer that is the arguments of one known function."""

    def __init__(self, name: str) -> None:
        """Take the function's name."""
        self._name = name

    def read(
        self, text: str, token_ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, Sequence[CallPart]]:
        """See Source.read."""
        del token_ids, finish_reason
        return "", [CallPart(0, self._name, text)] if text else []


class ArrayOfCalls:
    """Reads an array of {"name": …, "parameters": …}. What is no such array is text."""

    def __init__(self) -> None:
        """Begin before the array."""
        self._head = ""
        self._calls = 0
        self._inside = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def read(
        self, text: str, token_ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, Sequence[CallPart]]:
        """See Source.read."""
        del token_ids
        parts: list[CallPart] = []
        while text:
            text = self._arguments(text, parts) if self._inside else self._name(text, parts)
        return (self._head if finish_reason is not None and not self._calls else ""), parts

    def _name(self, text: str, parts: list[CallPart]) -> str:
        """Take what stands before arguments; return what is of them."""
        self._head += text
        found = HEAD.match(self._head)
        if found is None:
            return ""
        rest = self._head[found.end() :]
        parts.append(CallPart(self._calls, str(json.loads(found.group(1), strict=False))))
        self._calls += 1
        self._head, self._inside, self._depth = "", True, 0
        return rest

    def _arguments(self, text: str, parts: list[CallPart]) -> str:
        """Take arguments up to the brace that ends their call; return what follows it."""
        taken: list[str] = []
        end = len(text)
        for position, character in enumerate(text):
            if not self._in_string and self._depth == 0:
                if character.isspace():
                    continue
                if character == "}":
                    self._inside, end = False, position + 1
                    break
            self._step(character)
            taken.append(character)
        if taken:
            parts.append(CallPart(self._calls - 1, arguments="".join(taken)))
        return text[end:]

    def _step(self, character: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
