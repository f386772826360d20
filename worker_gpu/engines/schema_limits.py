"""Which JSON Schemas the engine can follow to the letter.

A grammar is made of the schema, and tokens that do not fit it are never chosen. xgrammar, which makes the grammar,
refuses what it knows to be wrong, but passes over other keywords without a word, so that the answer may break them.
A client that states a schema relies on it, and nothing is ignored silently here: such a schema is refused, with the
keyword's name. The rules below were found by asking xgrammar 0.2.8 for grammars of schemas with one keyword each, and
trying values against both. `oneOf` is read as `anyOf`: the branches of real schemas exclude each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.errors import Unsupported

MAX_CHARACTERS = 200_000
MAX_NESTING = 60  # vLLM refuses more than 64 levels, and calls of tools are put into a schema of a few.
NEVER_ENFORCED = (
    *("not", "if", "dependentRequired", "dependentSchemas", "dependencies"),
    *("contains", "minContains", "maxContains", "uniqueItems", "multipleOf", "$dynamicRef", "$recursiveRef"),
)
#: Of these a schema has one, and only annotations beside it: xgrammar reads the first and drops all else. A type may
#: stand there if it says nothing new.
EXCLUSIVE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
#: Keywords that speak of one type only.
OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "object": ("required", "minProperties", "maxProperties", "propertyNames", "patternProperties"),
    "array": ("minItems", "maxItems"),
}
STRUCTURE = (
    *(keyword for keywords in OF_TYPE.values() for keyword in keywords),
    *("properties", "additionalProperties", "unevaluatedProperties", "items", "prefixItems"),
)
TYPES = {
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    type(None): ("null",),
    dict: ("object",),
    list: ("array",),
}
LOOKAROUND = re.compile(r"\(\?<?[=!]")

SCHEMA = ("items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames")
SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")


def checked_text(schema: Mapping[str, Any], where: str) -> str:
    """Return the schema as JSON. Raises Unsupported if it is too long, or says what could not be kept.

    `where` is the parameter it came in, for the message.
    """
    text = schema_text(schema, where)
    for path, node in _schemas(schema):
        if (reason := _ignored(node)) is not None:
            raise Unsupported(f"the schema in {where} has {reason} (at {path}), which cannot be enforced", param=where)
    return text


def schema_text(schema: Mapping[str, Any], where: str) -> str:
    """Return the schema as JSON. Raises Unsupported if it is too long or no JSON."""
    if _nested_too_deeply(schema):
        raise Unsupported(f"the schema in {where} is nested too deeply: at most {MAX_NESTING} levels", param=where)
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError):
        raise Unsupported(f"the schema in {where} is no JSON", param=where) from None
    if len(text) > MAX_CHARACTERS:
        raise Unsupported(
            f"the schema in {where} has {len(text):,} characters, and at most {MAX_CHARACTERS:,} can be followed",
            param=where,
        )
    return text


def _nested_too_deeply(schema: Any) -> bool:
    level = [schema]
    for _ in range(MAX_NESTING + 1):
        containers = [node.values() if isinstance(node, Mapping) else node for node in level]
        level = [part for parts in containers for part in parts if isinstance(part, (Mapping, list))]
        if not level:
            return False
    return True


def _schemas(root: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give every schema in a schema, with its path. What is no schema where one should be is xgrammar's to refuse."""
    waiting: list[tuple[str, Any]] = [("#", root)]
    while waiting:
        path, node = waiting.pop()
        if not isinstance(node, Mapping):
            continue
        yield path, node
        waiting += [(f"{path}/{key}", node[key]) for key in SCHEMA if key in node]
        for key in SCHEMAS:
            if isinstance(node.get(key), list):
                waiting += [(f"{path}/{key}/{index}", one) for index, one in enumerate(node[key])]
        for key in NAMED_SCHEMAS:
            if isinstance(node.get(key), Mapping):
                waiting += [(f"{path}/{key}/{name}", one) for name, one in node[key].items()]


def _ignored(node: Mapping[str, Any]) -> str | None:
    """Return what one schema says in vain, leaving its parts aside."""
    for keyword in NEVER_ENFORCED:
        if keyword in node and node[keyword] is not False:
            return keyword
    alone = [keyword for keyword in EXCLUSIVE if keyword in node]
    beside = alone[1:] or [keyword for keyword in STRUCTURE if keyword in node]
    if alone and not beside and "type" in node and not _follows(alone[0], node[alone[0]], _stated(node)):
        beside = ["type"]
    if alone and beside:
        return f"{beside[0]} beside {alone[0]}"
    reference, pattern = node.get("$ref"), node.get("pattern")
    if isinstance(reference, str) and reference != "#" and not reference.startswith("#/"):
        return "a $ref that leads out of the schema"
    if isinstance(pattern, str) and LOOKAROUND.search(pattern):
        return "a pattern that looks ahead or back"
    return _untyped(node)


def _stated(node: Mapping[str, Any]) -> set[str]:
    """Return the types that a schema states."""
    types = node.get("type")
    return {one for one in (types if isinstance(types, list) else [types]) if isinstance(one, str)}


def _follows(keyword: str, value: Any, types: set[str]) -> bool:
    """Tell whether all that a keyword of `EXCLUSIVE` allows is of these types anyway."""
    if keyword == "$ref":
        return False
    if keyword == "const":
        return not types.isdisjoint(TYPES.get(type(value), ()))
    if not isinstance(value, list):
        return True  # xgrammar refuses it.
    if keyword == "enum":
        return all(_follows("const", one, types) for one in value)
    return all(isinstance(one, Mapping) and (own := _stated(one)) and own <= types for one in value)


def _untyped(node: Mapping[str, Any]) -> str | None:
    """Return what a schema that states no type says of one: xgrammar reads it only where the type is stated."""
    if not _stated(node) and "properties" not in node:
        for type_, keywords in OF_TYPE.items():
            for keyword in keywords:
                if keyword in node:
                    return f"{keyword} without the type {type_}"
    if node.get("required") and "properties" not in node:
        return "required without properties"
    return None
