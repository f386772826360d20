"""The batch in virtual time: what it says, and what it holds meanwhile. When, is in test_simulated_times.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import PromptTooLong, Unsupported
from tasks.job import ResponseFormat, Sampling, ToolUse
from tests.worker_gpu.engines.kv_replay import KvReplay
from tests.worker_gpu.engines.virtual_time import PROMPT, batch_of, request, serve, text, times
from worker_gpu.engines.base import GenerationRequest
from worker_gpu.engines.simulated_batch import ContinuousBatch
from worker_gpu.engines.simulated_options import STEP_S, STEP_S_PER_SEQUENCE, SimulationOptions
from worker_gpu.engines.simulated_sequence import make_sequences

TOOL = {"type": "function", "function": {"name": "look_up"}}


# --- What it holds ------------------------------------------------------------------------------------------------


def cached_tokens(batch: ContinuousBatch, job: GenerationRequest) -> int:
    """Run one request; return how many of its prompt's tokens were cached."""
    batch.add(job)
    (token,) = batch.step(0.0).tokens
    batch.abort(job.request_id)
    return token.sequence.cached_tokens


def test_whole_blocks_of_the_same_salt_are_found() -> None:
    """100 tokens are six full blocks of 16; a prompt of whole blocks still has its last one computed."""
    batch = batch_of()
    assert cached_tokens(batch, request("cold")) == 0
    assert cached_tokens(batch, request("same")) == 96
    assert cached_tokens(batch, request("branch", [*PROMPT[:50], 1, 2, 3])) == 48
    assert cached_tokens(batch, request("whole", PROMPT[:96])) == 80
    assert cached_tokens(batch, request("foreign", salt="other")) == 0
    off = batch_of(prefix_caching=False)
    assert [cached_tokens(off, request(name)) for name in ("cold", "same")] == [0, 0]


def test_answers_are_cached_too() -> None:
    """The next turn of a conversation, which holds the answer, finds its full blocks."""
    batch = batch_of(answer_tokens=50)
    (turn,) = make_sequences(request("turn"), SimulationOptions(answer_tokens=50))
    serve(batch, [(0.0, turn.request)])
    follow_up = [*PROMPT, *turn.answer.token_ids, 7, 7, 7]
    # Of 150 tokens the last was never computed, and nine blocks of 16 are full before it.
    assert cached_tokens(batch, request("next", follow_up)) == 144


def test_requests_that_arrive_together_share_their_prompt() -> None:
    """And so do the choices of one request, which say different things."""
    batch = batch_of(answer_tokens=4)
    batch.add(request("a", n=3))
    batch.add(request("b", seed=9))
    batch.step(0.0)
    # Six blocks together, and one for each of the four.
    assert len(batch.pool.in_use) == 10
    batch.check_integrity()
    said = serve(batch, [])
    assert len({text(said, "a", choice) for choice in range(3)} | {text(said, "b")}) == 4


def test_choices_are_what_their_seeds_would_say_alone() -> None:
    """Choice i is the first choice of seed + i."""
    said = serve(batch_of(), [(0.0, request("both", n=2, seed=5)), (0.0, request("alone", seed=6))])
    assert text(said, "both", 1) == text(said, "alone") != text(said, "both", 0)
    reasons = [token.finish_reason for token in said if token.request_id == "both" and token.finish_reason]
    assert reasons == ["stop", "stop"]


def test_the_latest_is_preempted_and_computed_again() -> None:
    """Ten blocks of 4 hold two sequences of 16 tokens but not both of their answers; both are answered all the same."""
    batch = batch_of(num_blocks=10, block_size=4, answer_tokens=16, prefix_caching=False)
    prompts = {name: list(range(start, start + 16)) for name, start in (("first", 0), ("second", 50))}
    spans: list[float] = []
    ends = [0.0]

    def after_step(now: float) -> None:
        batch.check_integrity()
        spans.append(now - ends[-1])
        ends.append(now)

    jobs = [request(name, prompt) for name, prompt in prompts.items()]
    said = serve(batch, [(0.0, job) for job in jobs], after_step)
    assert batch.preemptions == 1
    assert [len(times(said, name)) for name in prompts] == [16, 16]
    # Both fit until either has said 5 tokens: 16 + 4 are 5 blocks each. The second goes on when the first has ended.
    assert times(said, "second")[4] < times(said, "first")[-1] < times(said, "second")[5]
    recomputed = STEP_S + STEP_S_PER_SEQUENCE + (16 + 5) / 25_000
    assert spans[16] == pytest.approx(recomputed)
    alone = {
        name: text(serve(batch_of(answer_tokens=16), [(0.0, job)]), name)
        for name, job in zip(prompts, jobs, strict=True)
    }
    assert {name: text(said, name) for name in prompts} == alone


def test_the_preempted_go_on_before_others_begin() -> None:
    """The blocks the second lost would hold the third's prompt; it waits for the second all the same."""
    batch = batch_of(num_blocks=10, block_size=4, answer_tokens=16)
    sequences = [batch.add(request(str(index), list(range(index * 50, index * 50 + 16))))[0] for index in range(3)]
    said = serve(batch, [], lambda _: batch.check_integrity())
    assert batch.preemptions
    # What was said of the first admission stays, though the second found blocks of its own in the cache.
    assert (sequences[1].scheduled_at, sequences[1].cached_tokens) == (0.0, 0)
    assert times(said, "0")[-1] < times(said, "1")[5] <= times(said, "2")[0]


def test_aborting_frees_everything() -> None:
    """Whether it waits or runs; what is unknown or finished is no matter."""
    batch = batch_of(max_num_seqs=1)
    for name in ("runs", "waits", "follows"):
        batch.add(request(name))
    batch.step(0.0)
    batch.abort("waits")
    batch.abort("runs")
    batch.abort("runs")
    batch.abort("never heard of")
    assert not batch.pool.in_use
    said = serve(batch, [])
    assert {token.request_id for token in said} == {"follows"}
    assert batch.due_at() == math.inf


def test_the_cache_is_cleared_only_when_nothing_runs() -> None:
    """Afterwards nothing is found."""
    batch = batch_of()
    batch.add(request("a"))
    batch.step(0.0)
    assert batch.clear_cache() is False
    batch.abort("a")
    assert batch.clear_cache() is True
    assert cached_tokens(batch, request("b")) == 0


def test_integrity_is_checked() -> None:
    """Blocks that no running sequence has are found out."""
    batch = batch_of()
    batch.pool.allocate(1)
    with pytest.raises(AssertionError, match="by no sequence"):
        batch.check_integrity()


# --- What is refused ----------------------------------------------------------------------------------------------


def test_what_could_never_fit_is_refused() -> None:
    """All blocks together hold 96 tokens: 95 leave room for one."""
    batch = batch_of(num_blocks=6)
    assert batch.limits.max_model_len == 96
    said = serve(batch, [(0.0, request("fits", PROMPT[:95]))])
    assert [token.finish_reason for token in said] == ["length"]
    with pytest.raises(PromptTooLong):
        batch.add(request("full", PROMPT[:96]))
    batch.add(request("twice", PROMPT[:9]))
    with pytest.raises(ValueError, match="is running"):
        batch.add(request("twice", PROMPT[:9]))


def test_what_needs_a_model_is_refused() -> None:
    """A schema or a forced tool call; a model that may call tools may just talk instead."""
    batch = batch_of()
    with pytest.raises(Unsupported, match="response_format"):
        batch.add(request("json", response_format=ResponseFormat(type="json_object")))
    for choice in ("required", "function:look_up"):
        with pytest.raises(Unsupported, match="tool_choice"):
            batch.add(GenerationRequest("forced", PROMPT, Sampling(), "salt", ToolUse(tools=(TOOL,), choice=choice)))
    talks = GenerationRequest("free", PROMPT, Sampling(seed=1, max_tokens=400), "salt", ToolUse(tools=(TOOL,)))
    assert text(serve(batch, [(0.0, talks)]), "free") == text(serve(batch, [(0.0, request("plain"))]), "plain")


# --- For all loads ------------------------------------------------------------------------------------------------

LOADS = st.lists(
    st.tuples(
        st.floats(0, 0.05),
        st.integers(0, 2).flatmap(lambda start: st.integers(1, 30).map(lambda end: list(range(start, start + end)))),
        st.builds(Sampling, seed=st.integers(0, 3), max_tokens=st.integers(1, 20), n=st.integers(1, 3)),
        st.sampled_from(["one", "two"]),
    ),
    min_size=1,
    max_size=12,
)
SHAPES = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(8, 24),
        "block_size": st.integers(4, 5),
        "max_num_seqs": st.integers(1, 5),
        "max_batch_tokens": st.integers(1, 40),
        "prefix_caching": st.booleans(),
        "tokens_per_s_per_sequence": st.sampled_from([None, 20, 200]),
        "answer_tokens": st.just((1, 30)),
    }
)


@settings(deadline=None)
@given(LOADS, SHAPES, st.data())
def test_any_load_is_served_and_leaves_nothing_behind(
    load: list[tuple[float, list[int], Sampling, str]], shape: dict[str, Any], data: st.DataObject
) -> None:
    """Whatever comes, is preempted or aborted: everyone else is answered as if alone, and the events tell the cache."""
    options = SimulationOptions(**shape)
    batch, replay = ContinuousBatch(options), KvReplay()
    batch.events.subscribe(replay.apply)
    arrivals, now = [], 0.0
    for index, (gap, prompt, sampling, salt) in enumerate(load):
        now += gap
        arrivals.append((now, GenerationRequest(str(index), prompt, sampling, salt)))
    aborts = data.draw(st.dictionaries(st.integers(1, 40), st.sampled_from([job.request_id for _, job in arrivals])))
    steps = 0

    def after_step(_: float) -> None:
        nonlocal steps
        steps += 1
        assert steps < 20_000, "it makes no progress"
        if steps in aborts:
            batch.abort(aborts[steps])
        batch.check_integrity()
        assert replay.content.keys() == batch.pool.known

    said = serve(batch, arrivals, after_step)
    for _, job in arrivals:
        for sequence in make_sequences(job, options):
            for before, block_hash in zip([None, *sequence.hashes], sequence.hashes, strict=False):
                assert replay.content.get(block_hash, before) == before
            whole, heard = "".join(sequence.answer.texts), text(said, job.request_id, sequence.choice)
            assert heard == whole or (job.request_id in aborts.values() and whole.startswith(heard))
            at = times(said, job.request_id, sequence.choice)
            assert at == sorted(at)
    assert not batch.pool.in_use
    assert batch.due_at() == math.inf
