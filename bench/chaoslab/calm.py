"""What the answers are when nothing is killed: each question is asked once before the harm begins."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from bench.chaoslab.asking import Question
from bench.chaoslab.clients import Crowd
from bench.chaoslab.site import Site

CALM_S = 120.0


def questions(rng: random.Random, number: int, tokens: tuple[int, int]) -> list[Question]:
    """Return different questions, with answers of between so many tokens."""
    return [
        Question(f"Question {index} of {rng.randrange(10**9)}: what now?", rng.randint(*tokens), rng.randrange(2**31))
        for index in range(number)
    ]


def again_and_again(rng: random.Random, asked: Sequence[Question]) -> Iterator[Question]:
    """Yield these questions in a random order without end."""
    while True:
        yield rng.choice(asked)


def ask_calmly(site: Site, asked: Sequence[Question], seed: int) -> dict[Question, str]:
    """Return each question's answer. Raises RuntimeError if one does not come: then there is nothing to compare with."""
    with Crowd(site.urls, site.key, asked, seed=seed) as crowd:
        site.until(lambda: crowd.done, CALM_S, "the calm answers")
    for told in crowd.told:
        if told.event != "completed" or told.resets or told.faults or not told.text:
            raise RuntimeError(f"nothing was killed, yet {told}")
    return {told.question: told.text for told in crowd.told}
