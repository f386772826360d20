"""The batch in virtual time: when tokens come, and that they always come at the same times."""

from __future__ import annotations

import hashlib
import math
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.worker_gpu.engines.virtual_time import batch_of, request, serve, times
from worker_gpu.engines.simulated_options import STEP_S, STEP_S_PER_SEQUENCE

ROOT = Path(__file__).parents[3]


def test_first_tokens_take_what_was_measured() -> None:
    """With the constants of docs/simulation.md for it, the small model on two cores behaves as in the field notes.

    719 tokens, 704 of them static: first token 2.3 s cold, 0.16 s cached; 16 concurrent streams 93 tokens/s.
    """
    batch = batch_of(block_size=32, step_s=0.11, step_s_per_sequence=0.0039, prefill_tokens_per_s=330)
    static = list(range(704))
    cold, warm = (request(name, [*static, *[mark] * 15], max_tokens=1) for mark, name in enumerate(("cold", "warm")))
    assert times(serve(batch, [(0.0, cold)]), "cold") == [pytest.approx(2.3, abs=0.05)]
    assert times(serve(batch, [(0.0, warm)]), "warm") == [pytest.approx(0.16, abs=0.005)]
    streams = [(0.0, request(str(index), static[:1], seed=index, max_tokens=24)) for index in range(16)]
    at = times(serve(batch, streams), "0")
    assert 16 * 23 / (at[-1] - at[0]) == pytest.approx(93, abs=1)


def test_long_prompts_are_computed_in_chunks() -> None:
    """5,000 tokens take three steps of at most 2,048, between which others get their tokens."""
    batch = batch_of(max_batch_tokens=2048)
    said = serve(batch, [(0.0, request("short")), (0.05, request("long", list(range(5000)), max_tokens=1))])
    (first,) = times(said, "long")
    # Each of the three steps has a token of the other sequence, too; the first begins when the one before it ends.
    begun = min(at for at in times(said, "short") if at >= 0.05)
    assert first - begun == pytest.approx(5000 / 25_000 + 3 * (STEP_S + 2 * STEP_S_PER_SEQUENCE))
    assert len([at for at in times(said, "short") if begun < at <= first]) == 3


def test_a_long_prompt_may_be_computed_in_smaller_chunks() -> None:
    """With a threshold of 1,000, 5,000 tokens take five steps, and a short prompt beside them one."""
    batch = batch_of(max_batch_tokens=8192, long_prefill_token_threshold=1000)
    long = request("long", list(range(5000)), max_tokens=1)
    said = serve(batch, [(0.0, long), (0.001, request("short", max_tokens=1))])
    chunk = STEP_S + STEP_S_PER_SEQUENCE + 1000 / 25_000
    (first,) = times(said, "short")
    assert first == pytest.approx(2 * chunk + STEP_S_PER_SEQUENCE + 100 / 25_000)
    assert times(said, "long") == [pytest.approx(5 * chunk + STEP_S_PER_SEQUENCE + 100 / 25_000)]


def test_all_tokens_of_a_step_come_from_one_budget() -> None:
    """Of ten tokens, four sequences take one each; what is left is six a step for a prompt of 60."""
    batch = batch_of(max_batch_tokens=10, answer_tokens=50)
    said = serve(batch, [(0.0, request(name, [1])) for name in "abcd"] + [(0.001, request("long", list(range(60))))])
    before = [at for at in times(said, "a") if at < times(said, "long")[0]]
    # The first step gave the four their first tokens, the next nine computed 54 of the 60.
    assert len(before) == 1 + 9


def test_a_batch_shares_its_steps() -> None:
    """64 requests take hardly longer than one; the 65th waits for a slot."""
    batch = batch_of(answer_tokens=30)
    said = serve(batch, [(0.0, request(str(index), seed=index)) for index in range(65)])
    # The first step computes the prompt once, and its last 4 tokens for each of the others.
    prefill_s = (100 + 63 * 4) / 25_000
    last = [times(said, name)[-1] for name in ("0", "63")]
    assert last == [pytest.approx(30 * (STEP_S + 64 * STEP_S_PER_SEQUENCE) + prefill_s)] * 2
    assert times(said, "64")[0] > last[0]


def test_paced_streams_keep_their_pace_in_any_company() -> None:
    """20 tokens/s each, exactly so on average, while others come, go and have long prompts computed."""
    batch = batch_of(tokens_per_s_per_sequence=20, max_num_seqs=300, answer_tokens=(20, 60))
    arrivals = [
        (index * 0.01, request(str(index), list(range(index, index + 500)), seed=index)) for index in range(300)
    ]
    said = serve(batch, arrivals)
    for index in range(300):
        at = times(said, str(index))
        assert (at[-1] - at[0]) / (len(at) - 1) == pytest.approx(0.05, abs=0.05 / (len(at) - 1))
        assert max(later - earlier for earlier, later in pairwise(at)) < 0.1


def test_a_paced_stream_that_was_held_up_does_not_hurry() -> None:
    """The second is preempted for as long as the first runs; then its tokens come at their pace again."""
    batch = batch_of(num_blocks=10, block_size=4, answer_tokens=16, tokens_per_s_per_sequence=20)
    said = serve(batch, [(0.0, request(str(index), list(range(index * 50, index * 50 + 16)))) for index in range(2)])
    gaps = [later - earlier for earlier, later in pairwise(times(said, "1"))]
    assert batch.preemptions == 1
    assert max(gaps) > 0.4
    assert sorted(gaps)[:-1] == [pytest.approx(0.05, abs=0.02)] * 14
    assert sum(gaps) - max(gaps) == pytest.approx(14 * 0.05, abs=0.02)


def test_a_paced_batch_sleeps_until_a_token_is_due() -> None:
    """Stepping earlier takes no time and gives nothing, a request that arrives is due at once."""
    batch = batch_of(tokens_per_s_per_sequence=20)
    batch.add(request("a"))
    first = batch.step(0.0)
    assert batch.step(first.seconds) == (0.0, [])
    due = batch.due_at()
    second = batch.step(due)
    assert due + second.seconds - first.seconds == pytest.approx(0.05)
    assert batch.step(due + second.seconds) == (0.0, [])
    batch.add(request("b"))
    assert batch.due_at() == -math.inf


def busy_hour() -> str:
    """Return a digest of what a seeded load said, and exactly when."""
    rng = random.Random(7)
    batch = batch_of(num_blocks=130, max_model_len=1000)
    arrivals, now = [], 0.0
    for index in range(60):
        now += rng.expovariate(40)
        prompt = [*range(rng.randrange(4), 500), *(rng.randrange(9000) for _ in range(50))]
        arrivals.append((now, request(str(index), prompt, seed=index, n=rng.choice([1, 1, 2]))))
    said = serve(batch, arrivals)
    assert batch.preemptions
    return hashlib.sha256(repr(said).encode()).hexdigest()


def test_virtual_time_repeats_itself() -> None:
    """The same seed and arrivals give identical tokens at identical times, in another process too."""
    script = "from tests.worker_gpu.engines.test_simulated_times import busy_hour; print(busy_hour())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", script]
    other = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == busy_hour() == busy_hour()
