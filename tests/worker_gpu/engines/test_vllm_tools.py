"""What a model says, told apart by vLLM's own parsers: fed directly, cut anywhere, and made to fail. No engine runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tasks.errors import ConfigurationError, Unsupported
from tasks.job import FinishReason, ToolUse
from tests.tiny_model import make_tiny_model
from worker_gpu.engines.tool_reading import Source, ToolReader
from worker_gpu.engines.vllm_parsed_calls import ParsedCalls
from worker_gpu.engines.vllm_sampling import Constraint
from worker_gpu.engines.vllm_tools import LOGGERS, ToolParser

pytestmark = pytest.mark.vllm

#: Tokens that parsers look for in the vocabulary of the models they are for.
MARKS = ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS: tuple[dict[str, Any], ...] = tuple(
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("weather", "confirm")
)
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich \\"x\\" {", "days": 3}}\n</tool_call>'
ZURICH = {"city": 'Zürich "x" {', "days": 3}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return vLLM's description of the tiny model, with some more special tokens."""
    model: Path = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(model / "tokenizer.json"))
    arguments = import_module("vllm.engine.arg_utils").AsyncEngineArgs(model=str(model))
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    yield arguments.create_model_config()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="module")
def parsers(config: Any) -> dict[str, ToolParser]:
    """Return parsers that find calls in four different ways."""
    return {name: ToolParser(name, config) for name in ("hermes", "llama3_json", "pythonic", "phi4_mini_json")}


def pieces(text: str, cuts: Sequence[float]) -> Iterator[str]:
    """Cut a text anywhere."""
    places = sorted(round(cut * len(text)) for cut in cuts)
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        yield text[start:end]


def heard(
    parser: ToolParser, text: str, cuts: Sequence[float] = (), reason: FinishReason = "stop"
) -> tuple[str, list[tuple[str, str]], FinishReason | None]:
    """Return the text, the calls and the finish reason that a parser finds in what comes in pieces."""
    form = parser.form(ToolUse(tools=TOOLS), None, [1, 2, 3])
    assert form is not None
    assert form.constraint is None
    return told(form.source(), text, cuts, reason, parser._tokenizer)


def told(
    source: Source, text: str, cuts: Sequence[float], reason: FinishReason, tokenizer: Any
) -> tuple[str, list[tuple[str, str]], FinishReason | None]:
    """Return what a source finds; the answer's last token is no part of its text."""
    reader = ToolReader(source, "id{}".format, single=False)
    said, calls = "", list[list[str]]()
    shown: FinishReason | None = None
    ending = [tokenizer.eos_token_id] if reason == "stop" else []
    for piece, last in [*((piece, None) for piece in pieces(text, cuts)), ("", reason)]:
        ids = tokenizer.encode(piece, add_special_tokens=False) if last is None else ending
        more, deltas, shown = reader.read(piece, ids, last)
        said += more
        for delta in deltas:
            if delta.index == len(calls):
                calls.append([delta.name or "", ""])
            calls[delta.index][1] += delta.arguments
    return said, [(name, arguments) for name, arguments in calls], shown


@pytest.mark.parametrize(
    ("name", "text", "said", "calls"),
    [
        ("hermes", "Plain text <tool", "Plain text <tool", []),
        ("hermes", f"Sure. {HERMES}", "Sure. ", [("weather", ZURICH)]),
        (
            "hermes",
            f'a{HERMES}\n<tool_call>{{"name": "confirm"}}</tool_call>',
            "a",
            [("weather", ZURICH), ("confirm", {})],
        ),
        ("hermes", "<tool_call>no JSON</tool_call> after", "<tool_call>no JSON</tool_call> after", []),
        ("hermes", "<tool_call></tool_call>", "<tool_call></tool_call>", []),
        (
            "hermes",
            '<tool_call>{"arguments": {"city": "B"}, "name": "weather", "id": {}}</tool_call>',
            "",
            [("weather", {"city": "B"})],
        ),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"code": "a\n\tb"}}</tool_call>',
            "",
            [("f", {"code": "a\n\tb"})],
        ),
        ("llama3_json", "hello {", "hello {", []),
        (
            "llama3_json",
            '{"name": "weather", "parameters": {"city": "B"}}; {"name": "confirm", "parameters": {"city": "C"}}',
            "",
            [("weather", {"city": "B"}), ("confirm", {"city": "C"})],
        ),
        ("llama3_json", '{"name": "confirm", "parameters": {}}', "", [("confirm", {})]),
        ("llama3_json", '{"x": 1}', '{"x": 1}', []),
        (
            "pythonic",
            "[weather(city='B', days=3), confirm()]",
            "",
            [("weather", {"city": "B", "days": 3}), ("confirm", {})],
        ),
        ("pythonic", "[1, 2]", "[1, 2]", []),
        (
            "phi4_mini_json",
            'functools[{"name": "weather", "arguments": {"city": "B"}}]',
            "",
            [("weather", {"city": "B"})],
        ),
        ("phi4_mini_json", "Hello.", "Hello.", []),
    ],
)
@given(cuts=st.lists(st.floats(0, 1), max_size=30))
def test_calls_and_text_are_the_same_however_they_come(
    parsers: dict[str, ToolParser],
    name: str,
    text: str,
    said: str,
    calls: list[tuple[str, Any]],
    cuts: list[float],
) -> None:
    """In one piece, as when this process is late, or in many; nothing is lost, and all arguments are whole."""
    found, written, reason = heard(parsers[name], text, cuts)
    assert (found, [(name, json.loads(arguments)) for name, arguments in written]) == (said, calls)
    assert reason == ("tool_calls" if calls else "stop")


@given(
    text=st.text() | st.from_regex(r"(<tool_call>|\{|\"name\": |\"arguments\": |\}|</tool_call>|a){0,12}"),
    cuts=st.lists(st.floats(0, 1)),
)
def test_whatever_a_model_says_ends_no_request(parsers: dict[str, ToolParser], text: str, cuts: list[float]) -> None:
    """Where there is no call in it, all of it is text."""
    for parser in parsers.values():
        said, calls, _ = heard(parser, text, cuts, "length")
        assert calls or said == text


def test_answer_may_come_with_its_end(parsers: dict[str, ToolParser]) -> None:
    """All tokens at once, the one that ended it among them, though that is no part of the text."""
    text = '{"name": "weather", "parameters": {"city": "B"}}; {"name": "confirm", "parameters": {"city": "C"}}'
    form = parsers["llama3_json"].form(ToolUse(tools=TOOLS), None, [])
    assert form is not None
    tokenizer = parsers["llama3_json"]._tokenizer
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    _, deltas, reason = ToolReader(form.source(), "id{}".format, single=False).read(text, ids, "stop")
    assert [delta.name for delta in deltas if delta.name] == ["weather", "confirm"]
    assert reason == "tool_calls"


def test_half_a_call_stays_half(parsers: dict[str, ToolParser]) -> None:
    """At max_tokens, a call without arguments is not a call with none."""
    text = '<tool_call>{"name": "weather", "argum'
    assert heard(parsers["hermes"], text, [0.5], "length") == ("", [("weather", "")], "length")
    assert heard(parsers["hermes"], text, [0.5], "stop") == ("", [("weather", "{}")], "tool_calls")


class Faulty:
    """A parser that gives text up to a place, or calls, and then raises; see vLLM's Parser."""

    def __init__(self, config: Any, *, after: int, calls: bool = False) -> None:
        """Take after how many pieces it raises, and whether it finds a call in each."""
        self.model_tokenizer = import_module("vllm.tokenizers").cached_tokenizer_from_config(config)
        self.tool_parser = SimpleNamespace(prev_tool_call_arr=[], extract_tool_calls=self.parse_delta)
        self.left, self.calls = after, calls

    def parse_delta(self, text: str, *_: Any, **__: Any) -> Any:
        """Give what comes as text, or as a call."""
        self.left -= 1
        if self.left < 0:
            raise IndexError("secret words of a user")
        call = SimpleNamespace(index=0, function=SimpleNamespace(name="f", arguments=text))
        return SimpleNamespace(content=None if self.calls else text, tool_calls=[call] if self.calls else None)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_rest_is_text_when_a_parser_fails(config: Any, caplog: pytest.LogCaptureFixture, after: int) -> None:
    """None of it is lost; the log has what kind of error it was, and not what it says."""
    source = ParsedCalls(Faulty(config, after=after), SimpleNamespace(skip_special_tokens=True), [])
    tokenizer = source._parser.model_tokenizer
    assert told(source, "One two three.", [0.3, 0.6], "stop", tokenizer) == ("One two three.", [], "stop")
    assert "IndexError" in caplog.text
    assert "secret" not in caplog.text


def test_calls_made_before_a_parser_fails_stay(config: Any) -> None:
    """What comes after them is text: it may be anything."""
    source = ParsedCalls(Faulty(config, after=1, calls=True), SimpleNamespace(skip_special_tokens=True), [])
    reader = ToolReader(source, "id{}".format, single=False)
    _, (call,), _ = reader.read('{"a": 1}', [7], None)
    assert (call.name, call.arguments) == ("f", '{"a": 1}')
    assert reader.read("tail", [7], None) == ("tail", (), None)
    assert reader.read("s", [7], "stop") == ("s", (), "tool_calls")


def test_choices_do_not_meet(parsers: dict[str, ToolParser]) -> None:
    """Each source has a parser of its own."""
    form = parsers["hermes"].form(ToolUse(tools=TOOLS), None, [])
    assert form is not None
    first, second = form.source(), form.source()
    assert first.read("<tool_", [], None) == ("", [])
    assert second.read("call>", [], None) == ("call>", [])
    assert first.read("x", [], None) == ("<tool_x", [])


# --- What the model is held to --------------------------------------------------------------------


def test_only_where_the_parser_needs_them_special_tokens_are_text(parsers: dict[str, ToolParser]) -> None:
    """Hermes' marks are special tokens in some models; pythonic calls have none."""
    forms = {name: parser.form(ToolUse(tools=TOOLS), None, []) for name, parser in parsers.items()}
    assert {name for name, form in forms.items() if form and form.skip_special} == {*parsers} - {"hermes"}


@pytest.mark.parametrize("choice", ["required", "function:weather"])
def test_model_is_held_to_its_own_words_where_it_has_a_grammar(parsers: dict[str, ToolParser], choice: str) -> None:
    """Its arguments fit the schema, and no run of white space is possible; without a grammar, the answer is JSON."""
    form = parsers["hermes"].form(ToolUse(tools=TOOLS, choice=choice), None, [])
    assert form is not None
    assert form.constraint is not None
    assert form.constraint.kind == "structural_tag"
    assert '"required": ["city"]' in form.constraint.text
    assert '"max_whitespace_cnt": 1' in form.constraint.text
    assert '"max_whitespace_cnt": null' not in form.constraint.text
    assert ("confirm" in form.constraint.text) == (choice == "required")
    assert parsers["pythonic"].form(ToolUse(tools=TOOLS, choice=choice), None, []) is None


def test_strict_tools_hold_the_model_even_unforced(parsers: dict[str, ToolParser]) -> None:
    """As in OpenAI's API. One call at most is a matter of grammar, too."""
    strict = tuple({"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS)
    for tools in (ToolUse(tools=strict), ToolUse(tools=TOOLS, parallel=False)):
        form = parsers["hermes"].form(tools, None, [])
        assert form is not None
        assert form.constraint is not None
        assert form.constraint.kind == "structural_tag"
    assert "strict" not in TOOLS[0]["function"]


def test_form_of_text_stays_beside_the_tools(parsers: dict[str, ToolParser]) -> None:
    """Where vLLM has a grammar of both, either is possible; else the form of the text is kept."""
    wanted = Constraint("json", '{"type": "integer"}')
    both, text_only = (parsers[name].form(ToolUse(tools=TOOLS), wanted, []) for name in ("hermes", "pythonic"))
    assert both is not None
    assert both.constraint is not None
    assert both.constraint.kind == "structural_tag"
    assert text_only is not None
    assert text_only.constraint == wanted


# --- What stops the start -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama_json", r"did you mean .*llama3_json"),
        ("?", r"it has .*hermes, .*mistral"),
        ("jamba", "cannot read this model"),
        ("cohere_command3", "cannot read this model"),
    ],
)
def test_parser_that_cannot_be_used_stops_the_start(config: Any, name: str, message: str) -> None:
    """A name that is unknown, a model without its marks, a package that is not there."""
    with pytest.raises(ConfigurationError, match=message):
        ToolParser(name, config)


def test_parsers_are_silent(parsers: dict[str, ToolParser]) -> None:
    """They would quote what they cannot parse."""
    assert parsers
    for module in ("vllm.tool_parsers.hermes_tool_parser", "vllm.parser.abstract_parser"):
        assert not logging.getLogger(module).isEnabledFor(logging.ERROR)


def test_tools_a_parser_cannot_take_are_refused(
    parsers: dict[str, ToolParser], caplog: pytest.LogCaptureFixture
) -> None:
    """The message is ours: vLLM's would quote them."""
    broken = ({"type": "function", "function": {"name": "f", "parameters": "secret words"}},)
    with pytest.raises(Unsupported, match="hermes, cannot take these tools") as caught:
        parsers["hermes"].form(ToolUse(tools=broken), None, [])
    assert caught.value.__suppress_context__
    assert "secret" not in caplog.text
