"""What the simulated model says depends on what it was asked, and on nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.job import Sampling
from worker_gpu.engines.simulated_answer import WORDS, Answer, make_answer

STOP_LIMIT = 4


def answer(
    seed: int = 1, *, room: int = 1000, stop: tuple[str, ...] = (), bounds: tuple[int, int] = (24, 320)
) -> Answer:
    """Return an answer to one prompt."""
    return make_answer(b"digest", seed, bounds, room, stop)


def test_a_shorter_answer_is_a_prefix() -> None:
    """Cut off, it ends with length, at its own end with stop."""
    whole, cut = answer(), answer(room=5)
    assert whole.finish_reason == "stop"
    assert (cut.finish_reason, len(cut.texts)) == ("length", 5)
    assert cut.texts == whole.texts[:5]
    assert answer(room=len(whole.texts)) == whole


def test_length_lies_between_the_bounds() -> None:
    """Both are reached; equal ones fix it."""
    lengths = {len(answer(seed, bounds=(3, 6)).texts) for seed in range(60)}
    assert lengths == {3, 4, 5, 6}
    assert {len(answer(seed, bounds=(50, 50)).texts) for seed in range(5)} == {50}


def test_another_seed_or_prompt_gives_another_text() -> None:
    """And the same ones the same text, on every machine: this one is pinned."""
    assert len({"".join(answer(seed).texts) for seed in range(20)}) == 20
    assert make_answer(b"other", 1, (24, 320), 1000, ()) != answer()
    assert "".join(answer(bounds=(6, 6)).texts) == "a one its holds , it "


@given(st.integers(0, 50), st.lists(st.text("the or,s ", min_size=1, max_size=5), max_size=STOP_LIMIT))
def test_an_answer_ends_where_a_stop_string_first_ends(seed: int, stop: list[str]) -> None:
    """No part of it is given, in any token; text before it is whole."""
    whole, stopped = answer(seed), answer(seed, stop=tuple(stop))
    text, kept = "".join(whole.texts), "".join(stopped.texts)
    assert not any(string in kept for string in stop)
    assert text.startswith(kept)
    if any(string in text for string in stop):
        assert stopped.finish_reason == "stop"
        assert any(text[len(kept) :].startswith(string) for string in stop)
        # The last token is the one that completed it.
        said, count = whole.texts, len(stopped.texts)
        assert any(string in "".join(said[:count]) for string in stop)
        assert not any(string in "".join(said[: count - 1]) for string in stop)
        assert stopped.draws == whole.draws[: len(stopped.texts)]
    else:
        assert stopped == whole


@pytest.mark.parametrize("alternatives", [0, 1, 20])
def test_log_probabilities_are_plausible(alternatives: int) -> None:
    """The token is the likeliest of different ones, which together stay below certainty."""
    whole = answer()
    for index, text in enumerate(whole.texts):
        logprob = whole.logprob(index, alternatives)
        assert logprob.token == text
        assert len(logprob.top) == len({token for token, _ in logprob.top}) == alternatives
        chances = [math.exp(chance) for _, chance in logprob.top]
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) < 1
        assert math.exp(logprob.logprob) < 1
        assert logprob.top[:1] in ((), ((text, logprob.logprob),))
    assert len({whole.logprob(index, 0).logprob for index in range(len(whole.texts))}) > 3


def test_there_are_words_for_all_alternatives() -> None:
    """A request may ask for as many as Sampling allows, and all differ."""
    most = Sampling(logprobs=20).logprobs
    assert most is not None
    assert len(set(WORDS)) == len(WORDS) > most
    assert len(WORDS) < 256
