"""Options of the simulated engine, and the time steps take."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from worker_gpu.engines.simulated_options import PREFILL_TOKENS_PER_S, STEP_S, STEP_S_PER_SEQUENCE, SimulationOptions


def test_a_step_takes_its_share_of_everything() -> None:
    """A fixed part, one per sequence, one per prompt token; the scale stretches all of them."""
    for scale in (0.0, 1.0, 20.0):
        time = SimulationOptions(time_scale=scale).step_time
        expected = STEP_S + 64 * STEP_S_PER_SEQUENCE + 8192 / PREFILL_TOKENS_PER_S
        assert time.seconds(64, 8192) == pytest.approx(expected * scale)
        assert (time.period_s, time.prompt_limit) == (0.0, None)


@pytest.mark.parametrize("tokens_per_s", [1, 20, 150, 1000])
def test_paced_steps_take_at_most_half_a_period(tokens_per_s: float) -> None:
    """However many sequences there are, and with as many prompt tokens as one step may compute, which is not few."""
    time = SimulationOptions(tokens_per_s_per_sequence=tokens_per_s).step_time
    assert time.period_s == pytest.approx(1 / tokens_per_s)
    assert time.prompt_limit is not None
    assert time.seconds(1000, time.prompt_limit) <= time.period_s / 2
    assert time.prompt_limit / time.seconds(1, time.prompt_limit) > 0.4 * PREFILL_TOKENS_PER_S


def test_a_sequence_never_outgrows_the_blocks() -> None:
    """The context window is what all blocks hold, if that is less than asked for."""
    assert SimulationOptions(max_model_len=8192).context_window == 8192
    assert SimulationOptions(max_model_len=8192, num_blocks=10, block_size=16).context_window == 160


def test_answers_are_of_one_length_or_between_two() -> None:
    """JSON has lists, not tuples."""
    assert SimulationOptions(answer_tokens=200).answer_bounds == (200, 200)
    assert SimulationOptions.model_validate({"answer_tokens": [1, 9]}).answer_bounds == (1, 9)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens_per_s_per_sequence": 0},
        {"answer_tokens": [9, 1]},
        {"answer_tokens": 0},
        {"num_blocks": 0},
        {"prefill_tokens_per_s": 0},
        {"step_s": -1},
        {"time_scale": float("inf")},
        {"colour": "red"},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    """Each of them alone."""
    with pytest.raises(ValidationError):
        SimulationOptions(**options)
