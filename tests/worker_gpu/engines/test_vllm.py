"""The real engine on a tiny model: one engine for the whole module, because each start takes seconds.

The last two tests end it, so they must stay last.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.errors import ConfigurationError, EngineDead, EngineFailed, PromptTooLong, Unsupported
from tasks.job import ResponseFormat, ToolUse
from tasks.prompts.radix import Tier
from tasks.settings import EngineGroup, Settings
from tests.tiny_model import CONTEXT, VOCABULARY, make_tiny_model
from tests.worker_gpu.engines.vllm_cache_runs import Seen, ask, ask_many, profiles
from tests.worker_gpu.engines.vllm_host import PROMPT, Host, Said, collect, request, said, text
from worker_gpu.engines import create_engine, vllm
from worker_gpu.engines.vllm import VllmEngine
from worker_gpu.engines.vllm_sampling import Constraint, sampling_params
from worker_gpu.watchdog import Watchdog

pytestmark = pytest.mark.vllm

SLOTS = 16
#: Of 32 tokens: few enough for tests to fill, and enough for all slots at once.
BLOCKS = 192
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Bern", "Zürich", "Chur"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "note": {"$ref": "#/$defs/note"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"note": {"type": "string", "maxLength": 6}},
}
CONFIRM = {
    "type": "object",
    "properties": {"note": {"$ref": "#/$defs/note"}},
    "required": ["note"],
    "additionalProperties": False,
    "$defs": {"note": {"type": "boolean"}},
}
SCHEMAS = {"weather": WEATHER, "confirm": CONFIRM}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Start the engine once; its settings in the environment do not outlive this module."""
    environment = dict(os.environ)
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    group = EngineGroup(
        model=str(model),
        max_num_seqs=SLOTS,
        kv_cache_gib=0.25,
        tool_parser="hermes",
        options={"num_gpu_blocks_override": BLOCKS + 1},
    )
    engine = create_engine(Settings(engine=group))
    assert isinstance(engine, VllmEngine)
    host = Host(engine)
    try:
        host.run(engine.start())
        yield host
    finally:
        host.run(engine.stop())
        host.close()
        os.environ.clear()
        os.environ.update(environment)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Tell whether a value fits a schema."""
    return bool(import_module("jsonschema").Draft202012Validator(schema).is_valid(value))


def check_calls(choice: Said) -> None:
    """Each call names a tool and has arguments that fit it."""
    assert choice.text == ""
    assert choice.finish_reason == "tool_calls"
    assert all(fits(json.loads(arguments), SCHEMAS[name]) for _, name, arguments in choice.calls), choice.calls


# --- The running engine ---------------------------------------------------------------------------


def test_stream_is_what_vllm_says_in_one_piece(host: Host) -> None:
    """The joined deltas are vLLM's own text, though single tokens are parts of characters."""
    from vllm.sampling_params import RequestOutputKind

    job = request(max_tokens=200)

    async def whole() -> Any:
        params = sampling_params(job.sampling)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        output = await anext(host.engine._llm.generate({"prompt_token_ids": PROMPT}, params, "whole"))
        return output.outputs[0]

    deltas, expected = host.run(collect(host.engine.generate(job))), host.run(whole())
    assert text(deltas) == expected.text
    assert deltas[-1].output_tokens == len(expected.token_ids) == 200
    assert len(deltas) > 100
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["length"]
    assert deltas[-1].finish_reason == "length"


def test_limits_are_the_models_and_ours(host: Host) -> None:
    """The context window comes from the checkpoint, the slots from the settings."""
    limits = host.engine.limits
    assert (limits.max_model_len, limits.max_num_seqs, limits.block_size) == (CONTEXT, SLOTS, 32)


def test_second_request_finds_whole_blocks(host: Host) -> None:
    """Of 100 shared tokens, three blocks of 32 are found; another salt finds none."""
    first, second = host.ask(salt="a"), host.ask([*PROMPT, 11, 12], salt="a")
    assert {delta.cached_tokens for delta in first} == {0}
    assert {delta.cached_tokens for delta in second} == {96}
    assert {delta.cached_tokens for delta in host.ask(salt="b")} == {0}


def test_prefill_time_is_known_from_the_first_delta(host: Host) -> None:
    """It is positive, and does not change."""
    times = {delta.prefill_s for delta in host.ask()}
    assert len(times) == 1
    assert 0 < (times.pop() or 0) < 5


def test_same_seed_same_text(host: Host) -> None:
    """Another seed gives another text."""
    assert text(host.ask(seed=5)) == text(host.ask(seed=5)) != text(host.ask(seed=6))


def test_stop_string_ends_the_answer_and_is_not_part_of_it(host: Host) -> None:
    """The text before it is what it would have been."""
    free = text(host.ask(max_tokens=64))
    stop = next(
        piece for piece in (free[at : at + 4] for at in range(len(free) // 2, len(free))) if "\ufffd" not in piece
    )
    deltas = host.ask(max_tokens=64, stop=(stop,))
    assert text(deltas) == free[: free.index(stop)]
    assert deltas[-1].finish_reason == "stop"


def test_errors_do_not_quote_the_prompt(host: Host) -> None:
    """VLLM names a token id outside the vocabulary; we do not, not even as a cause. The engine goes on."""
    with pytest.raises(EngineFailed) as caught:
        host.ask([10, 11, VOCABULARY + 4242])
    assert str(VOCABULARY + 4242) not in str(caught.value)
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None
    host.run(host.engine.check_health())
    assert host.ask(max_tokens=1)


def test_prompt_without_room_is_refused(host: Host) -> None:
    """A prompt as long as the context window leaves no token for the answer."""
    with pytest.raises(PromptTooLong):
        host.ask([10] * CONTEXT)
    assert host.ask([10] * (CONTEXT - 1))[-1].output_tokens == 1


def test_requests_are_batched(host: Host) -> None:
    """All of 16 have their first token before any of them has its last."""
    events: list[tuple[int, bool]] = []

    async def read(number: int) -> None:
        async for delta in host.engine.generate(request(name=f"batched-{number}", max_tokens=100)):
            if not delta.finish_reason:
                events.append((number, False))  # noqa: PERF401
        events.append((number, True))

    async def all_of_them(_: VllmEngine) -> None:
        await asyncio.gather(*(read(number) for number in range(SLOTS)))

    host.check(all_of_them)
    before_any_end = events[: next(index for index, (_, ended) in enumerate(events) if ended)]
    assert {number for number, _ in before_any_end} == set(range(SLOTS))


def test_closing_the_stream_frees_its_slot(host: Host) -> None:
    """With all slots taken a request waits; it runs as soon as one reader leaves, the others unfinished."""

    async def check(engine: VllmEngine) -> None:
        holders = [engine.generate(request(name=f"holder-{n}", max_tokens=1900)) for n in range(SLOTS)]
        await asyncio.gather(*(anext(holder) for holder in holders))
        waiting = asyncio.create_task(collect(engine.generate(request(name="waiting", max_tokens=2))))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await holders[0].aclose()
        assert (await asyncio.wait_for(waiting, 2))[-1].output_tokens == 2
        for holder in holders[1:]:
            assert (await anext(holder)).finish_reason is None
            await holder.aclose()
        assert not engine._llm.output_processor.has_unfinished_requests()

    host.check(check)


# --- What the cache holds -------------------------------------------------------------------------


def test_what_the_index_expects_is_found(host: Host) -> None:
    """By every prompt, though the cache evicts all the time, two organizations say the same, and blocks have copies."""

    async def check(engine: VllmEngine) -> None:
        rng, cache, seen = random.Random(1), host.cache, Seen()
        engine.subscribe(seen.hear)
        known = profiles(rng, most=1600)
        found = await ask_many(engine, cache, rng, known, prompts=40)
        assert [each for each in found if each.expected != each.cached] == []
        print(f"{sum(each.cached > 0 for each in found)} hits, {seen.evicted} evictions, {seen.copies_left} of a copy")
        assert sum(each.cached > 0 for each in found) > 10
        assert seen.evicted > 100
        assert seen.copies_left
        facts = cache.facts
        assert (cache.blocks.losses, facts.capacity_tokens) == (0, BLOCKS * 32)
        assert 0 < facts.known_tokens <= cache.blocks.count(Tier.GPU) * 32 <= BLOCKS * 32

    host.check(check)


def test_what_was_missed_is_told_by_prompts(host: Host) -> None:
    """After a loss nothing counts as cached until a prompt finds it; from then on it is known, and never too much."""

    async def check(engine: VllmEngine) -> None:
        rng, cache = random.Random(2), host.cache
        known = profiles(rng, most=200)
        first = await ask_many(engine, cache, rng, known, prompts=10)
        assert [each for each in first if each.expected != each.cached] == []
        engine._cache.events.skip()
        await ask(engine, cache, known[0], [], 1)
        assert (cache.blocks.losses, cache.cached(known[-1].name)) == (1, (0, 0, 0))
        for profile in known:
            await ask(engine, cache, profile, [], 1)
        later = await ask_many(engine, cache, rng, known, prompts=20)
        assert all(each.expected <= each.cached for each in later)
        assert sum(each.expected < each.cached for each in later) <= 2, "a copy's end counts as the block's"
        assert sum(each.expected > 0 for each in later) > 10

    host.check(check)


# --- Several answers, and how likely they are -----------------------------------------------------


def test_choices_are_the_answers_of_neighbouring_seeds(host: Host) -> None:
    """Their deltas come mixed, each choice ends once, and the count is of all of them."""
    deltas = host.ask(n=3, seed=7)
    alone = [text(host.ask(seed=seed)) for seed in (7, 8, 9)]
    assert [choice.text for choice in said(deltas)] == alone
    assert [choice.finish_reason for choice in said(deltas)] == ["length"] * 3
    counts = [delta.output_tokens for delta in deltas]
    assert counts == sorted(counts)
    assert counts[-1] == 96
    assert [delta.choice for delta in deltas] != sorted(delta.choice for delta in deltas)


def test_greedy_choices_are_the_same(host: Host) -> None:
    """VLLM refuses to make several; here each is the one that is likeliest. The largest seed has neighbours, too."""
    alone = text(host.ask(temperature=0.0))
    assert [choice.text for choice in host.answers(temperature=0.0, n=3, seed=2**63 - 1)] == [alone] * 3


def test_logprobs_are_those_of_the_tokens(host: Host) -> None:
    """One entry a token, its text the token's; alternatives are sorted, and greedy choice takes one of the likeliest."""
    (none,) = host.answers()
    (bare,) = host.answers(logprobs=0)
    (greedy,) = host.answers(logprobs=5, temperature=0.0)
    assert (none.logprobs, len(bare.logprobs), len(greedy.logprobs)) == ([], 32, 32)
    assert all(entry.top == () and -50 < entry.logprob < 0 for entry in bare.logprobs)
    for entry in greedy.logprobs:
        # Two tokens may be equally likely, to the last bit.
        assert (entry.token, entry.logprob) in entry.top
        assert entry.logprob == entry.top[0][1]
        assert len(entry.top) == 5
        assert [logprob for _, logprob in entry.top] == sorted((logprob for _, logprob in entry.top), reverse=True)


def test_logprobs_go_with_their_choice(host: Host) -> None:
    """Their tokens together are its text; the one that only ends the answer is not shown. Twenty alternatives at most."""
    schema = {"type": "string", "pattern": "^[a-z ]{5,30}$"}
    wanted = ResponseFormat(type="json_schema", json_schema=schema)
    for choice in host.answers(n=4, max_tokens=60, logprobs=20, response_format=wanted):
        assert choice.finish_reason == "stop"
        assert "".join(entry.token for entry in choice.logprobs) == choice.text
        assert {len(entry.top) for entry in choice.logprobs} == {20}


def test_no_parameter_ends_the_engine(host: Host) -> None:
    """Each at once, with log probabilities: vLLM would compile functions for some, for which there may be no compiler."""
    extremes: dict[str, Any] = {
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
    }
    assert len(host.answers(n=2, logprobs=2, **extremes)[1].logprobs) == 32
    host.run(host.engine.check_health())
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


# --- Answers of a form ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schema",
    [
        WEATHER,
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}]},
        {"type": "string", "minLength": 3, "maxLength": 5},
        {"type": "object", "properties": {"a b": {"const": "é"}, "at": {"type": "string", "format": "date"}}},
    ],
)
def test_answer_fits_its_schema(host: Host, schema: dict[str, Any]) -> None:
    """Random weights say what the schema allows, and nothing else."""
    wanted = ResponseFormat(type="json_schema", json_schema=schema)
    for choice in host.answers(n=8, max_tokens=200, response_format=wanted):
        assert choice.finish_reason == "stop"
        assert fits(json.loads(choice.text), schema), choice.text


def test_json_object_is_one(host: Host) -> None:
    """What ends within its tokens is an object; what does not is the beginning of one."""
    wanted = ResponseFormat(type="json_object")
    choices = host.answers(n=16, max_tokens=300, response_format=wanted)
    assert all(choice.text.startswith("{") for choice in choices)
    whole = [json.loads(choice.text) for choice in choices if choice.finish_reason == "stop"]
    assert whole
    assert all(isinstance(value, dict) for value in whole)


DEEP: dict[str, Any] = {}
for _ in range(500):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objekt"}, 'Unsupported type "objekt"'),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Invalid range"),
        ({"$ref": "#/$defs/none"}, "Cannot find field"),
        ({"type": "string", "pattern": "^[a-z]{0,1000}$"}, "Check failed"),
        ({"type": "integer", "not": {"const": 3}}, "not"),
        ({"enum": ["x" * 200_000]}, "200,0"),
        (DEEP, "nested too deeply"),
    ],
)
def test_schema_that_cannot_be_followed_is_refused(host: Host, schema: dict[str, Any], message: str) -> None:
    """The message is about the schema, not the prompt; the engine goes on."""
    with pytest.raises(Unsupported, match=message) as caught:
        host.ask(response_format=ResponseFormat(type="json_schema", json_schema=schema))
    assert len(caught.value.detail) < 300
    assert caught.value.extensions["param"] == "response_format"
    assert str(PROMPT[3:5])[1:-1] not in caught.value.detail
    host.run(host.engine.check_health())
    assert host.ask(max_tokens=1)


def test_grammar_the_engine_fails_at_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if nothing else has noticed, it is the schema's fault."""
    assert host.engine._forms is not None
    monkeypatch.setattr(host.engine._forms, "_check", None)
    for schema in ({"type": "string", "pattern": "^[a-z]{0,999}$"}, {"type": "objekt"}):
        with pytest.raises(Unsupported, match="cannot be followed by this engine"):
            host.ask(response_format=ResponseFormat(type="json_schema", json_schema=schema))
    assert host.ask(max_tokens=1)


# --- Calls of tools -------------------------------------------------------------------------------


@pytest.fixture(params=["the model's words", "JSON"])
def forced(request: pytest.FixtureRequest, host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Return the host, with and without a tool parser: a call can be forced either way."""
    if request.param == "JSON":
        monkeypatch.setattr(host.engine._forms, "_parser", None)
    return host


def test_required_calls_fit_their_tools(forced: Host) -> None:
    """Of one kind or another, one or several; each has an id of its own."""
    choices = forced.answers(ToolUse(tools=TOOLS, choice="required"), n=8, max_tokens=1500)
    for choice in choices:
        check_calls(choice)
    ids = [call[0] for choice in choices for call in choice.calls]
    assert len(set(ids)) == len(ids) > 8
    assert all(call_id.startswith("call_") and len(call_id) == 29 for call_id in ids)
    assert {call[1] for choice in choices for call in choice.calls} == {"weather", "confirm"}


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_named_function_is_called(forced: Host, name: str) -> None:
    """It alone, once."""
    for choice in forced.answers(ToolUse(tools=TOOLS, choice=f"function:{name}"), n=4, max_tokens=200):
        check_calls(choice)
        assert [call[1] for call in choice.calls] == [name]


def test_without_parallel_calls_there_is_one(forced: Host) -> None:
    """The grammar ends after it."""
    for choice in forced.answers(ToolUse(tools=TOOLS, choice="required", parallel=False), n=8, max_tokens=200):
        check_calls(choice)
        assert len(choice.calls) == 1


def test_half_a_call_is_not_called_whole(forced: Host) -> None:
    """Cut off at max_tokens, the answer says so."""
    tools = ToolUse(tools=TOOLS, choice="function:weather")
    cut = [choice for limit in range(4, 60, 8) for choice in forced.answers(tools, max_tokens=limit) if choice.calls]
    begun = [choice for choice in cut if choice.calls[0][2] and choice.finish_reason == "length"]
    assert begun
    for choice in begun:
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            json.loads(choice.calls[0][2])


def test_repeated_attempt_has_the_same_ids(host: Host) -> None:
    """Another worker may begin an answer again, under another name; another seed is another answer."""
    tools = ToolUse(tools=TOOLS, choice="function:confirm")
    first, again, other = (host.answers(tools, name=name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("a", 2)))
    assert first == again
    assert first[0].calls[0][0] != other[0].calls[0][0]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (ToolUse(tools=TOOLS, choice="function:nobody"), "none of the tools"),
        (
            ToolUse(
                tools=({"type": "function", "function": {"name": "a", "parameters": {"type": "objekt"}}},),
                choice="required",
            ),
            "schema in tools",
        ),
        (
            ToolUse(
                tools=({"type": "function", "function": {"name": "a", "strict": True, "parameters": {"not": {}}}},),
                choice="required",
            ),
            "not",
        ),
    ],
)
def test_tools_that_cannot_be_forced_are_refused(forced: Host, tools: ToolUse, message: str) -> None:
    """The engine goes on."""
    with pytest.raises(Unsupported, match=message):
        forced.ask(tools=tools)
    assert forced.ask(max_tokens=1)


def test_calls_of_its_own_accord_need_a_parser(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what to set."""
    monkeypatch.setattr(host.engine._forms, "_parser", None)
    with pytest.raises(Unsupported) as caught:
        host.ask(tools=ToolUse(tools=TOOLS))
    assert caught.value.extensions["setting"] == "engine.tool_parser"


def test_what_a_model_writes_is_told_apart(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made to write text and calls as its parser knows them, each choice shows both; made to write none, its text."""
    call = r'<tool_call>\n\{"name": "weather", "arguments": \{"city": "(Bern|Chur)", "days": [1-9]\}\}\n</tool_call>'

    def writing(pattern: str) -> list[Said]:
        monkeypatch.setattr(
            vllm,
            "sampling_params",
            lambda sampling, _, *, skip_special: sampling_params(
                sampling, Constraint("regex", pattern), skip_special=skip_special
            ),
        )
        return host.answers(ToolUse(tools=TOOLS), n=6, max_tokens=300)

    both = writing(rf"<tool is sure\. ({call}){{1,3}}")
    assert {choice.text for choice in both} == {"<tool is sure. "}
    assert len({len(choice.calls) for choice in both}) > 1
    for choice in both:
        choice.text = ""
        check_calls(choice)
    assert len({call[0] for choice in both for call in choice.calls}) == sum(len(choice.calls) for choice in both)
    for choice in writing(r"Sure <tool_call>(x|y){3}"):
        assert (choice.calls, choice.finish_reason) == ([], "stop")
        assert re.fullmatch("Sure <tool_call>[xy]{3}", choice.text)


def test_tools_and_a_form_for_text_go_together(host: Host) -> None:
    """Each choice is a call of a tool, or JSON of the form: the model may choose."""
    wanted = ResponseFormat(type="json_schema", json_schema=WEATHER)
    asked: dict[str, Any] = {"n": 8, "max_tokens": 120, "temperature": 2.0, "response_format": wanted}
    choices = [
        choice
        for begin in (0, 20, 40)
        for choice in said(host.ask(PROMPT[begin:], tools=ToolUse(tools=TOOLS), **asked))
    ]
    called = [choice for choice in choices if choice.calls]
    answered = [choice for choice in choices if not choice.calls and choice.finish_reason == "stop"]
    assert called
    assert answered
    assert all(choice.finish_reason in ("tool_calls", "length") for choice in called)
    assert all(choice.text == "" and choice.calls[0][1] in SCHEMAS for choice in called)
    assert all(fits(json.loads(choice.text), WEATHER) for choice in answered)


def test_closing_a_request_of_many_choices_frees_all_slots(host: Host) -> None:
    """Sixteen choices take every slot; when their reader leaves, what waits runs at once."""

    async def check(engine: VllmEngine) -> None:
        holder = engine.generate(request(name="holder", n=SLOTS, max_tokens=1900))
        seen: set[int] = set()
        while len(seen) < SLOTS:
            seen.add((await anext(holder)).choice)
        waiting = asyncio.create_task(collect(engine.generate(request(name="waiting", n=SLOTS, max_tokens=2))))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await holder.aclose()
        assert len(said(await asyncio.wait_for(waiting, 5))) == SLOTS
        assert not engine._llm.output_processor.has_unfinished_requests()

    host.check(check)


# --- Steps ----------------------------------------------------------------------------------------


def test_steps_are_counted(host: Host) -> None:
    """One a token, and none while there is nothing to do; on plain processors an engine is given time."""

    async def check(engine: VllmEngine) -> None:
        before = engine.steps
        loads = [engine.load async for _ in engine.generate(request(max_tokens=40))]
        counted = engine.steps - before
        assert max(load.running for load in loads) == 1
        assert 0 < max(load.kv_usage or 0 for load in loads) < 1
        assert (engine.load.running, engine.load.waiting, engine.load.preemptions) == (0, 0, 0)
        assert 40 <= counted <= 60
        assert not engine.busy
        await asyncio.sleep(0.3)
        assert engine.steps - before <= counted + 2
        assert engine.stall_s >= 60

    host.check(check)


def test_a_hung_engine_is_found(host: Host) -> None:
    """EngineCore is stopped in the middle of an answer: it lives, vLLM finds it healthy, and the watchdog does not. An engine
    that goes on is not harmed by having been watched.
    """
    stall_s = 2.0

    async def check(engine: VllmEngine) -> None:
        core = engine._processes[0].pid
        reader = engine.generate(request(max_tokens=300))
        await anext(reader)
        rest = asyncio.create_task(collect(reader))
        os.kill(core, signal.SIGSTOP)
        try:
            began = time.monotonic()
            with pytest.raises(EngineDead, match="hangs"):
                await asyncio.wait_for(Watchdog(engine, stall_s).watch(), 30)
            print(f"found after {time.monotonic() - began:.1f} s")
            assert time.monotonic() - began < stall_s + 8
            await engine.check_health()
        finally:
            os.kill(core, signal.SIGCONT)
        watching = asyncio.create_task(Watchdog(engine, 20).watch())
        assert (await rest)[-1].finish_reason == "length"
        assert not watching.done()
        watching.cancel()

    host.check(check)


# --- Starting and ending; these tests must stay last ----------------------------------------------


def test_settings_vllm_refuses_stop_the_start(tmp_path: Path, host: Host) -> None:
    """The message is vLLM's own; nothing is started."""
    engine = VllmEngine(Settings(engine=EngineGroup(model=str(tmp_path), options={"no_such_option": 1})))
    with pytest.raises(ConfigurationError, match="no_such_option"):
        host.run(engine.start())
    with pytest.raises(EngineDead):
        host.run(engine.check_health())


def test_unknown_tool_parser_stops_the_start(host: Host) -> None:
    """Before anything is loaded; the message has names that are close."""
    model = host.engine._settings.engine.model
    engine = VllmEngine(Settings(engine=EngineGroup(model=model, kv_cache_gib=0.25, tool_parser="hermess")))
    with pytest.raises(ConfigurationError, match=r"did you mean hermes.*\?"):
        host.run(engine.start())
    assert not engine._processes
    host.run(engine.stop())


def test_stop_ends_readers_and_processes(host: Host) -> None:
    """A running request raises EngineDead, EngineCore is gone; a second stop does nothing."""
    core = host.engine._processes[0]

    async def check(engine: VllmEngine) -> None:
        reader = engine.generate(request(max_tokens=1900, n=3))
        await anext(reader)
        rest = asyncio.create_task(collect(reader))
        await engine.stop()
        with pytest.raises(EngineDead):
            await rest
        for call in (engine.check_health(), collect(engine.generate(request()))):
            with pytest.raises(EngineDead):
                await call
        await engine.stop()

    host.check(check)
    assert not psutil.pid_exists(core.pid)


def test_death_of_the_engine_process_is_noticed(host: Host) -> None:
    """Started again, it serves; when EngineCore is killed, its readers and the health check raise EngineDead."""

    async def check(engine: VllmEngine) -> None:
        await engine.start()
        reader = engine.generate(request(max_tokens=1900))
        await anext(reader)
        os.kill(engine._processes[0].pid, signal.SIGKILL)
        with pytest.raises(EngineDead):
            await asyncio.wait_for(collect(reader), 10)
        with pytest.raises(EngineDead):
            await engine.check_health()
        await engine.stop()

    host.check(check)
