"""Calls of tools as plain JSON, and how what a source finds becomes calls; no engine and no vLLM is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import Unsupported
from tasks.job import FinishReason, Sampling, ToolCallDelta, ToolUse
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.json_calls import ArrayOfCalls, NamedCall, json_form
from worker_gpu.engines.json_text import JsonText
from worker_gpu.engines.tool_reading import CallPart, Source, ToolReader, call_ids

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=3)
CALLS = st.lists(st.tuples(st.text(min_size=1), OBJECTS), min_size=1, max_size=3)
#: Where to cut a text, as parts of its length.
CUTS = st.lists(st.floats(0, 1), max_size=20)
SPACES = st.sampled_from(["", " ", "\n  "])


def pieces(text: str, cuts: Sequence[float]) -> Iterator[str]:
    """Cut a text anywhere."""
    places = sorted(round(cut * len(text)) for cut in cuts)
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        yield text[start:end]


def read(
    source: Source, text: str, cuts: Sequence[float], reason: FinishReason = "stop"
) -> tuple[str, list[list[str]]]:
    """Return what a source finds in a text that comes in pieces: its text, and name and arguments of its calls."""
    found, calls = "", list[list[str]]()
    parts: list[CallPart] = []
    for piece in pieces(text, cuts):
        said, new = source.read(piece, [], None)
        found, parts = found + said, [*parts, *new]
    said, new = source.read("", [], reason)
    for part in [*parts, *new]:
        if part.index == len(calls):
            calls.append(["", ""])
        calls[part.index][0] += part.name or ""
        calls[part.index][1] += part.arguments
    return found + said, calls


# --- Reading ----------------------------------------------------------------------------------------


@given(CALLS, CUTS, SPACES, st.booleans())
def test_array_of_calls_is_read_however_it_is_cut(
    calls: list[tuple[str, Any]], cuts: list[float], space: str, ascii_only: bool
) -> None:
    """Names and arguments come out as they were put in, whatever white space stands between."""

    def dumped(value: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii_only)

    items = [
        f'{{{space}"name":{space}{dumped(name)}{space},{space}"parameters"{space}:{space}{dumped(value)}{space}}}'
        for name, value in calls
    ]
    text, found = read(ArrayOfCalls(), f"{space}[{space}" + f"{space},{space}".join(items) + f"{space}]", cuts)
    assert text == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize("text", ["", "Hello.", '{"name": "f"}', '[{"name": "f", "x": 1}]', "[]"])
def test_what_is_no_array_of_calls_is_text(text: str) -> None:
    """Nothing that a model says is lost."""
    assert read(ArrayOfCalls(), text, [0.3, 0.6]) == (text, [])


def test_half_an_array_gives_half_a_call() -> None:
    """What there is of the arguments is passed on at once."""
    source = ArrayOfCalls()
    assert source.read('[{"name": "f", "parameters": {"a": "', [], None)[1] == [
        CallPart(0, "f"),
        CallPart(0, None, '{"a": "'),
    ]
    assert source.read("b", [], "length") == ("", [CallPart(0, None, "b")])


@given(OBJECTS, CUTS)
def test_named_call_is_its_arguments(arguments: dict[str, Any], cuts: list[float]) -> None:
    """The name is known, and comes with the first of them."""
    text = json.dumps(arguments)
    assert read(NamedCall("f"), text, cuts) == ("", [["f" * (1 + len([c for c in pieces(text, cuts) if c]) - 1), text]])


@given(JSON, CUTS)
def test_json_is_left_as_it_is(value: Any, cuts: list[float]) -> None:
    """However it is cut; white space outside of strings is no mistake."""
    for text in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False)):
        reader = JsonText()
        assert "".join(reader.read(piece) for piece in pieces(text, cuts)) == text


@given(st.dictionaries(st.text(), st.text()), CUTS, st.text())
def test_control_characters_in_strings_are_escaped(value: dict[str, str], cuts: list[float], rest: str) -> None:
    """A model that writes line breaks as they are is understood; of what follows an object nothing is taken."""
    escapes = {f"\\u{code:04x}": chr(code) for code in range(32)} | {"\\n": "\n", "\\t": "\t", "\\r": "\r"}
    text = json.dumps(value, ensure_ascii=False).replace("\\\\", "")
    for escape, character in escapes.items():
        text = text.replace(escape, character)
    meant = json.loads(text, strict=False)
    reader = JsonText(one_object=True)
    assert json.loads("".join(reader.read(piece) for piece in pieces(text + rest, cuts))) == meant


NASTY = {"a\\": '"}]{["', "b": ["\\\\", '\\"', {"c": "\u2028"}], "": "x\\"}


@pytest.mark.parametrize("at", range(len(json.dumps(NASTY))))
def test_no_place_is_bad_to_cut_at(at: int) -> None:
    """Not between a backslash and what it escapes, either."""
    text = json.dumps(NASTY)
    reader = JsonText(one_object=True)
    assert reader.read(text[:at]) + reader.read(text[at:] + "} rest") == text
    call = f'[{{"name": "f", "parameters": {text}}}, {{"name": "g", "parameters": {{}}}}]'
    cut = (at + call.index(text)) / len(call)
    assert [(name, json.loads(arguments)) for name, arguments in read(ArrayOfCalls(), call, [cut])[1]] == [
        ("f", NASTY),
        ("g", {}),
    ]


# --- Making the schema ----------------------------------------------------------------------------


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Return a tool in OpenAI's shape."""
    schema = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **schema, **more}}


NOTED = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}, "$ref": {"type": "null"}}, "required": ["n"]}
TOOLS = (
    tool("text", NOTED | {"$defs": {"n": {"type": "string"}}}),
    tool("number", NOTED | {"$defs": {"n": {"type": "integer"}}}),
    tool("tree", {"type": "object", "properties": {"left": {"$ref": "#"}}, "additionalProperties": False}),
    tool("nothing"),
)


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        (("text", {"n": "a"}), True),
        (("text", {"n": 1}), False),
        (("number", {"n": 1}), True),
        (("number", {"n": "a"}), False),
        (("tree", {"left": {"left": {}}}), True),
        (("tree", {"left": {"right": {}}}), False),
        (("nothing", {}), True),
        (("nothing", {"a": 1}), False),
        (("other", {}), False),
    ],
)
def test_each_call_is_held_to_its_own_schema(call: tuple[str, Any], fits: bool) -> None:
    """Definitions of the same name do not meet, and a reference to the root leads to the tool's own."""
    jsonschema = pytest.importorskip("jsonschema")
    constraint, source = json_form(ToolUse(tools=TOOLS, choice="required"))
    schema = json.loads(constraint.text)
    jsonschema.Draft202012Validator.check_schema(schema)
    value = [{"name": call[0], "parameters": call[1]}]
    assert jsonschema.Draft202012Validator(schema).is_valid(value) == fits
    assert not jsonschema.Draft202012Validator(schema).is_valid([])
    assert source is ArrayOfCalls


def test_tools_are_not_changed() -> None:
    """They are the job's, which others read."""
    before = json.dumps(TOOLS)
    json_form(ToolUse(tools=TOOLS, choice="required"))
    assert json.dumps(TOOLS) == before


def test_only_parallel_calls_are_several() -> None:
    """Without them, the array has one element."""
    for parallel, limit in ((True, None), (False, 1)):
        constraint, _ = json_form(ToolUse(tools=TOOLS, choice="required", parallel=parallel))
        assert json.loads(constraint.text).get("maxItems") == limit


def test_only_a_strict_function_must_be_followed_to_the_letter() -> None:
    """Of others, as much as can be."""
    schema = {"type": "object", "not": {}}
    for choice in ("required", "function:f"):
        json_form(ToolUse(tools=(tool("f", schema),), choice=choice))
        with pytest.raises(Unsupported, match="not"):
            json_form(ToolUse(tools=(tool("f", schema, strict=True),), choice=choice))


# --- From a source's findings to calls ------------------------------------------------------------


class Script:
    """A source that gives what it was told to, one element a time."""

    def __init__(self, *parts: CallPart) -> None:
        """Take what to give."""
        self.parts = list(parts)

    def read(
        self, text: str, token_ids: Sequence[int], finish_reason: FinishReason | None
    ) -> tuple[str, Sequence[CallPart]]:
        """See Source.read."""
        del token_ids, finish_reason
        return text, [self.parts.pop(0)] if self.parts else []


def deltas(reader: ToolReader, count: int) -> list[ToolCallDelta]:
    """Return what a reader makes of its source's first findings."""
    return [delta for _ in range(count) for delta in reader.read("", [], None)[1]]


def test_calls_are_numbered_and_named_once() -> None:
    """Whatever numbers a source has, and however often it says a name."""
    script = Script(
        CallPart(7, "a"), CallPart(7, "a", "{"), CallPart(9, "b", "{}"), CallPart(7, None, "}"), CallPart(9)
    )
    assert deltas(ToolReader(script, "id{}".format, single=False), 5) == [
        ToolCallDelta(index=0, id="id0", name="a"),
        ToolCallDelta(index=0, arguments="{"),
        ToolCallDelta(index=1, id="id1", name="b", arguments="{}"),
        ToolCallDelta(index=0, arguments="}"),
    ]


def test_single_drops_all_but_the_first() -> None:
    """A model that cannot be held to one call is cut short."""
    script = Script(CallPart(0, "a", "{}"), CallPart(1, "b", "{}"), CallPart(1, None, "x"))
    assert [delta.name for delta in deltas(ToolReader(script, "id{}".format, single=True), 3)] == ["a"]


@pytest.mark.parametrize(
    ("parts", "reason", "shown"),
    [
        ((), "stop", "stop"),
        ((), "length", "length"),
        ((CallPart(0, "a", "{}"),), "stop", "tool_calls"),
        ((CallPart(0, "a", "{"),), "length", "length"),
        ((CallPart(0, "a"),), None, None),
    ],
)
def test_finish_reason_tells_of_whole_calls(
    parts: tuple[CallPart, ...], reason: FinishReason | None, shown: FinishReason | None
) -> None:
    """An answer that was cut off may have half a call."""
    assert ToolReader(Script(*parts), str, single=False).read("x", [], reason)[2] == shown


def test_ids_are_the_answers_own() -> None:
    """The same for the same answer under another request's name; else each its own."""
    request = GenerationRequest("one", [1, 2, 3], Sampling(seed=1), "salt")
    ids = [
        call_ids(changed, choice, mistral=False)(number)
        for changed in (
            request,
            replace(request, prompt_token_ids=[1, 2]),
            replace(request, cache_salt="other"),
            replace(request, sampling=Sampling(seed=2)),
        )
        for choice in (0, 1)
        for number in (0, 1)
    ]
    assert len(set(ids)) == len(ids)
    again = replace(request, request_id="two")
    assert call_ids(again, 1, mistral=False)(1) == ids[3]
    unseeded = replace(request, sampling=Sampling())
    assert call_ids(unseeded, 0, mistral=False)(0) != call_ids(replace(unseeded, request_id="two"), 0, mistral=False)(0)
    assert len(call_ids(request, 0, mistral=True)(0)) == 9
