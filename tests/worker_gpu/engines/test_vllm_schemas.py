"""Which schemas are followed to the letter, and what keeps the others from the engine."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.errors import EngineFailed, Unsupported
from tests.tiny_model import VOCABULARY, make_tiny_model
from worker_gpu.engines import grammar_check
from worker_gpu.engines.grammar_check import GrammarCheck
from worker_gpu.engines.schema_limits import MAX_CHARACTERS, checked_text, schema_text
from worker_gpu.engines.vllm_sampling import Constraint

TEXT = {"type": "string"}
WHOLE = {"type": "integer"}

#: Schemas, each with a value that it forbids and that a grammar of xgrammar 0.2.8 might allow.
FORBIDDEN: list[tuple[dict[str, Any], Any]] = [
    ({"not": TEXT}, "a"),
    ({"oneOf": [TEXT], "minLength": 3}, "a"),
    ({"anyOf": [TEXT], "type": "object"}, "a"),
    ({"anyOf": [{"$ref": "#/$defs/a"}], "type": "object", "$defs": {"a": TEXT}}, "a"),
    ({"allOf": [TEXT, {"enum": ["a"]}]}, "b"),
    ({"enum": ["a", 1], "type": "string"}, 1),
    ({"const": True, "type": "integer"}, True),
    ({"enum": ["a"], "type": "string", "minLength": 5}, "a"),
    ({"type": "object", "properties": {"a": TEXT}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {}),
    ({"$ref": "#/$defs/x", "minimum": 5, "$defs": {"x": WHOLE}}, 3),
    ({"$ref": "#name", "$defs": {"a": {"$anchor": "name", "type": "integer"}}}, "a"),
    ({"contains": WHOLE}, ["a"]),
    ({"type": "array", "uniqueItems": True}, [1, 1]),
    ({"multipleOf": 2}, 3),
    ({"minLength": 3}, "a"),
    ({"pattern": "^a$"}, "b"),
    ({"minimum": 3}, 1),
    ({"required": ["a"]}, {}),
    ({"type": "object", "required": ["a"]}, {}),
    ({"type": "string", "pattern": "^(?=a)b$"}, "b"),
    ({"type": "string", "pattern": "^[0-9]+$", "minLength": 3}, "1"),
    ({"type": "object", "properties": {"a": {"items": {"not": WHOLE}}}}, {"a": [1]}),
    ({"type": "object", "properties": {"a": WHOLE}, "additionalProperties": False}, {"b": 1}),
    ({"type": "array", "prefixItems": [TEXT], "items": False}, ["a", 1]),
    ({"type": "object", "patternProperties": {"^a": WHOLE}}, {"ab": "x"}),
    ({"type": ["string", "null"], "maxLength": 1}, "ab"),
]

#: Schemas such as clients send, each with a value that it allows.
ALLOWED: list[tuple[dict[str, Any], Any]] = [
    ({}, [1, {"a": None}]),
    ({"type": "string", "enum": ["a", "b"], "title": "T", "description": "D", "default": "a"}, "b"),
    ({"type": ["string", "null"], "maxLength": 3}, None),
    ({"type": "integer", "minLength": 3, "required": []}, 7),
    ({"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "default": None, "$defs": {"A": WHOLE}}, 3),
    ({"allOf": [{"$ref": "#/$defs/A"}], "description": "D", "$defs": {"A": {"const": 1, "type": "integer"}}}, 1),
    ({"type": "object", "anyOf": [{"type": "object", "properties": {"a": TEXT}, "required": ["a"]}]}, {"a": "x"}),
    ({"type": "object", "properties": {"required": TEXT, "not": WHOLE}, "required": ["not"]}, {"not": 1}),
    ({"type": "array", "items": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "maxItems": 3}, [0.5]),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}, {"next": {}}),
    ({"definitions": {"A": {"type": "string", "format": "date"}}, "$ref": "#/definitions/A"}, "2026-01-31"),
]


@cache
def grammar(schema: str) -> Any:
    """Return xgrammar's grammar of a schema, None if xgrammar or vLLM refuse it."""
    backend = import_module("vllm.v1.structured_output.backend_xgrammar")
    if backend.has_xgrammar_unsupported_json_features(json.loads(schema)):
        return None
    try:
        return import_module("xgrammar").Grammar.from_json_schema(schema, any_whitespace=False, separators=(",", ":"))
    except RuntimeError:
        return None


def allows(schema: str, value: Any) -> bool:
    """Tell whether the model could write a value."""
    made = grammar(schema)
    accepts: Callable[..., bool] = import_module("xgrammar.testing")._is_grammar_accept_string
    # Where a schema says nothing of an array's elements, this grammar has a space between them.
    forms = (json.dumps(value, separators=(comma, ":")) for comma in (",", ", "))
    return made is not None and any(accepts(made, form) for form in forms)


@pytest.mark.vllm
@pytest.mark.parametrize(("schema", "value"), FORBIDDEN)
def test_what_a_schema_forbids_is_never_written(schema: dict[str, Any], value: Any) -> None:
    """Either the schema is refused, or its grammar does not let the value pass."""
    assert not import_module("jsonschema").Draft202012Validator(schema).is_valid(value)
    try:
        text = checked_text(schema, "here")
    except Unsupported as refusal:
        assert "schema in here" in refusal.detail
        assert refusal.extensions["param"] == "here"
    else:
        assert not allows(text, value)


@pytest.mark.vllm
@pytest.mark.parametrize(("schema", "value"), ALLOWED)
def test_usual_schemas_are_followed(schema: dict[str, Any], value: Any) -> None:
    """A check that refused all would be safe, and of no use."""
    assert import_module("jsonschema").Draft202012Validator(schema).is_valid(value)
    assert allows(checked_text(schema, "here"), value)


def test_most_are_refused_with_the_reason() -> None:
    """The place is a JSON pointer into the schema."""
    with pytest.raises(Unsupported, match=r"has not \(at #/properties/a/items\), which cannot be enforced"):
        checked_text({"properties": {"a": {"items": {"not": {}}}}}, "here")
    with pytest.raises(Unsupported, match="leads out of the schema"):
        checked_text({"$ref": "http://169.254.169.254/schema"}, "here")


def nested(depth: int) -> dict[str, Any]:
    """Return a schema of so many levels."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [nested(61), nested(100_000), {"enum": ["x" * MAX_CHARACTERS]}, {"const": float("nan")}, {"const": b"bytes"}],
)
def test_what_is_too_much_is_refused_unread(schema: dict[str, Any]) -> None:
    """However deep it is: Python's own recursion must not be what finds out."""
    for check in (schema_text, checked_text):
        with pytest.raises(Unsupported, match=r"nested|characters|no JSON"):
            check(schema, "here")
    assert json.loads(schema_text(nested(60), "here")) == nested(60)


# --- Trying grammars out --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """Return a loop that outlives a test."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory, loop: asyncio.Runner) -> Iterator[GrammarCheck]:
    """Return a check for the tiny model that gives each grammar two seconds; its process takes longer to start."""
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(model)
    check = GrammarCheck(tokenizer, VOCABULARY, compact=True, cpu_s=2)
    yield check
    loop.run(check.stop())


def held_to(schema: dict[str, Any]) -> Constraint:
    """Return what holds an answer to a schema."""
    return Constraint("json", json.dumps(schema))


def slow(repeats: int) -> Constraint:
    """Return a constraint that takes minutes to compile."""
    return held_to({"type": "string", "pattern": f"[\\u0000-\\uffff]{{0,{repeats}}}"})


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        (held_to({"type": "objekt"}), 'Unsupported type "objekt"'),
        (held_to({"type": "array", "uniqueItems": True}), "features not supported"),
        (held_to({"type": "string", "pattern": "("}), "not closed"),
        (Constraint("structural_tag", '{"type": "structural_tag", "format": {"type": "nothing"}}'), "nothing"),
    ],
)
def test_refusals_say_why_in_one_line(
    check: GrammarCheck, loop: asyncio.Runner, constraint: Constraint, reason: str
) -> None:
    """The reason is xgrammar's, without its line numbers, or vLLM's, which come after."""
    with pytest.raises(Unsupported, match=reason) as caught:
        loop.run(check.check(constraint, "here"))
    assert caught.value.detail.startswith("the schema in here cannot be followed: ")
    assert "/project/" not in caught.value.detail
    assert "\n" not in caught.value.detail


@pytest.mark.vllm
def test_process_lives_until_its_input_ends(check: GrammarCheck, loop: asyncio.Runner) -> None:
    """As it does when whoever asks dies. One that has ended is started again for the next question."""
    loop.run(check.check(held_to(TEXT), "here"))
    process = check._process
    for constraint in (held_to(WHOLE), Constraint("json_object"), Constraint("regex", "("), held_to(TEXT)):
        loop.run(check.check(constraint, "here"))
    assert check._process is process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert loop.run(process.wait()) == 0
    assert not psutil.pid_exists(process.pid)


@pytest.mark.vllm
def test_slow_grammar_is_given_up_and_remembered(check: GrammarCheck, loop: asyncio.Runner) -> None:
    """The kernel ends the process that makes it. Asked again, the answer is at hand."""
    loop.run(check.check(held_to({"type": "null"}), "here"))
    process = check._process
    for _ in range(2):
        with pytest.raises(Unsupported, match="too complex"):
            loop.run(check.check(slow(20_000), "here"))
        assert check._process is None
    assert process is not None
    assert process.returncode == -signal.SIGXCPU


@pytest.mark.vllm
def test_request_that_goes_away_leaves_no_answer_behind(check: GrammarCheck, loop: asyncio.Runner) -> None:
    """The next question would be answered with it."""

    async def leave() -> None:
        await check.check(held_to({"type": "boolean"}), "here")
        asked = asyncio.create_task(check.check(slow(19_999), "here"))
        await asyncio.sleep(0.2)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        with pytest.raises(Unsupported, match="object without"):
            await check.check(held_to({"type": "object without"}), "here")

    loop.run(leave())


@pytest.mark.vllm
def test_tokenizer_that_xgrammar_cannot_read_is_vllms_to_check(loop: asyncio.Runner) -> None:
    """As it is with Mistral's: then nothing is tried out, and nothing refused."""
    check = GrammarCheck(object(), VOCABULARY, compact=True)
    for _ in range(2):
        loop.run(check.check(held_to({"type": "objekt"}), "here"))
    assert check._process is None


def test_process_that_does_not_start_is_the_engines_fault(
    loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing about the schema."""
    monkeypatch.setattr(grammar_check, "_described", lambda *_: "a tokenizer")
    monkeypatch.setattr(grammar_check, "SCRIPT", Path("no such script"))
    with pytest.raises(EngineFailed):
        loop.run(GrammarCheck(object(), VOCABULARY, compact=True).check(held_to(TEXT), "here"))
