"""What one round is, and what is noted of it; the same for both sides."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from bench.enginelab.prompts import Ask


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: when it was asked for, and when its first and its last token came, in seconds of one clock."""

    asked_at: float
    first_at: float
    ended_at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    """All answers of a round."""

    answers: list[Answered]

    @property
    def tokens(self) -> int:
        """Return how many tokens the answers have together."""
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        """Return them by the time from the first question to the last answer's end."""
        began = min(answer.asked_at for answer in self.answers)
        return self.tokens / (max(answer.ended_at for answer in self.answers) - began)

    @property
    def first_token_s(self) -> float:
        """Return the median time to the first token."""
        return statistics.median(answer.first_at - answer.asked_at for answer in self.answers)

    @property
    def step_s(self) -> float:
        """Return the median time between two tokens of an answer."""
        return statistics.median(
            (answer.ended_at - answer.first_at) / (answer.tokens - 1) for answer in self.answers if answer.tokens > 1
        )


Answer = Callable[[Ask], Awaitable[Answered]]


async def play(clients: Sequence[Sequence[Ask]], answer: Answer) -> Round:
    """Let every client ask its questions, each as soon as the one before is answered."""

    async def client(asks: Sequence[Ask]) -> list[Answered]:
        return [await answer(ask) for ask in asks]

    return Round(list(chain.from_iterable(await asyncio.gather(*map(client, clients)))))


def now() -> float:
    """Return the time on the clock that all processes of a machine share."""
    return time.monotonic()
