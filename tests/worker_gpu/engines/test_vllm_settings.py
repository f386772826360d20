"""How settings become what vLLM is started with, and sampling what it is asked; no engine is needed."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tasks.job import ResponseFormat, Sampling
from tasks.settings import CachingGroup, EngineGroup, SchedulingGroup, Settings
from worker_gpu.engines.vllm_sampling import (
    Constraint,
    answer_constraint,
    constraint_of,
    sampling_params,
    structured_outputs,
    token_logprobs,
)
from worker_gpu.engines.vllm_settings import engine_arguments, set_cpu_environment, set_environment


def test_options_override_every_other_setting() -> None:
    """An operator has the last word on what vLLM gets."""
    group = EngineGroup(model="org/name", revision="abc", max_model_len=512, options={"dtype": "half", "seed": 3})
    arguments = engine_arguments(Settings(engine=group, scheduling=SchedulingGroup(max_batch_tokens=640)), on_cpu=True)
    assert (arguments["model"], arguments["revision"], arguments["max_model_len"]) == ("org/name", "abc", 512)
    assert (arguments["dtype"], arguments["seed"], arguments["max_num_batched_tokens"]) == ("half", 3, 640)
    assert arguments["block_size"] % 32 == 0


def test_accelerators_get_vllms_own_defaults() -> None:
    """Block size, compilation and memory are set for the CPU only."""
    arguments = engine_arguments(Settings(engine=EngineGroup(kv_cache_gib=1)), on_cpu=False)
    assert not {"block_size", "enforce_eager", "kv_cache_memory_bytes"} & arguments.keys()
    assert arguments["dtype"] == "auto"


def test_either_caching_setting_turns_prefix_caching_off() -> None:
    """Both must be on for it."""
    for changes in ({"kv_cache_enabled": False}, {"static_prefix_caching": False}):
        assert not engine_arguments(Settings(caching=CachingGroup.model_validate(changes)), on_cpu=False)[
            "enable_prefix_caching"
        ]
    assert engine_arguments(Settings(), on_cpu=False)["enable_prefix_caching"]


def test_our_plugin_joins_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_PLUGINS is an exclusive list; unset, it lets all plugins in."""
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
    for given, result in (("theirs", "theirs,metaqore_no_orphans"), ("", "metaqore_no_orphans")):
        monkeypatch.setenv("VLLM_PLUGINS", given)
        set_environment(Settings())
        assert os.environ["VLLM_PLUGINS"] == result
    monkeypatch.delenv("VLLM_PLUGINS")
    set_environment(Settings())
    assert "VLLM_PLUGINS" not in os.environ


def test_nothing_is_compiled_where_the_model_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who has the model compiled keeps torch's compiler, and one who has set the variable his value."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_WAIT_POLICY", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    set_cpu_environment(eager=False)
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    set_cpu_environment(eager=True)
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    set_cpu_environment(eager=True)
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"


@pytest.mark.vllm
def test_sampling_reaches_vllm_unchanged() -> None:
    """Each parameter has its counterpart; a top_k of 0 means no limit to both."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "seed")
    for sampling in (
        Sampling(seed=0),
        Sampling(
            max_tokens=7,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.1,
            presence_penalty=-1.5,
            frequency_penalty=1.5,
            stop=("a", "b"),
            seed=2**63 - 1,
        ),
    ):
        params = sampling_params(sampling)
        assert {name: getattr(params, name) for name in names} == sampling.model_dump(include=set(names))
        assert params.stop == list(sampling.stop)


@pytest.mark.vllm
def test_choices_logprobs_and_special_tokens_reach_vllm() -> None:
    """Several greedy choices are drawn from the one likeliest token; one greedy choice is greedy."""
    plain = sampling_params(Sampling())
    assert (plain.n, plain.logprobs, plain.structured_outputs, plain.skip_special_tokens) == (1, None, None, True)
    several = sampling_params(Sampling(n=3, logprobs=0, temperature=0.0, top_k=9), skip_special=False)
    assert (several.n, several.logprobs, several.skip_special_tokens) == (3, 0, False)
    assert (several.temperature, several.top_k) == (1.0, 1)
    assert sampling_params(Sampling(temperature=0.0)).temperature == 0.0


@pytest.mark.vllm
@pytest.mark.parametrize(
    "constraint",
    [Constraint("json", "{}"), Constraint("json_object"), Constraint("structural_tag", "{}"), Constraint("regex", "a")],
)
def test_constraints_go_to_vllm_and_come_back(constraint: Constraint) -> None:
    """What a parser has made of a request is read as what we would have asked for."""
    assert constraint_of(structured_outputs(constraint)) == constraint
    assert constraint_of(structured_outputs(None)) is None
    assert constraint_of(SimpleNamespace(json={"a": 1})) == Constraint("json", '{"a": 1}')


def test_response_format_becomes_a_constraint() -> None:
    """A schema that is left out allows any JSON."""
    schema = {"type": "string"}
    assert answer_constraint(Sampling()) is None
    for wanted, constraint in (
        (ResponseFormat(type="json_object"), Constraint("json_object")),
        (ResponseFormat(type="json_schema", json_schema=schema), Constraint("json", '{"type": "string"}')),
        (ResponseFormat(type="json_schema"), Constraint("json", "{}")),
    ):
        assert answer_constraint(Sampling(response_format=wanted)) == constraint


def entry(token: str | None, logprob: float, rank: int | None) -> Any:
    """Return a Logprob of vLLM's."""
    return SimpleNamespace(decoded_token=token, logprob=logprob, rank=rank)


def test_logprobs_are_as_openai_shows_them() -> None:
    """The chosen token is an alternative only if it is likely enough; minus infinity becomes -9999."""
    completion = SimpleNamespace(
        token_ids=[5, 2],
        logprobs=[
            {5: entry("far", -7.5, 40), 8: entry("second", -1.0, 2), 7: entry("first", -0.5, 1)},
            {2: entry("<end>", -0.1, 1), 9: entry(None, float("-inf"), 2)},
        ],
        finish_reason=None,
        stop_reason=None,
    )
    first, second = token_logprobs(completion, 2)
    assert (first.token, first.logprob, first.top) == ("far", -7.5, (("first", -0.5), ("second", -1.0)))
    assert second.top == (("<end>", -0.1), ("", -9999.0))
    assert [one.top for one in token_logprobs(completion, 0)] == [(), ()]
    assert token_logprobs(completion, None) == ()
    # Without a new token, vLLM repeats what it said before.
    completion.token_ids = []
    assert token_logprobs(completion, 2) == ()


@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "count"), [("stop", None, 1), ("stop", "x", 2), ("length", None, 2)]
)
def test_token_that_ends_an_answer_is_not_shown(finish_reason: str, stop_reason: str | None, count: int) -> None:
    """One that completes a stop string is a part of the answer's tokens, as in OpenAI's API."""
    completion = SimpleNamespace(
        token_ids=[5, 2],
        logprobs=[{5: entry("a", -1.0, 1)}, {2: entry("b", -1.0, 1)}],
        finish_reason=finish_reason,
        stop_reason=stop_reason,
    )
    assert len(token_logprobs(completion, 1)) == count
