"""A scenario's requests as text: the same ones, at the same times, for every system.

A profile and a question are words, each of them one token for the gateway's tokenizer and for the engines behind the
routers. Answers are cut at a length that the request says, so that they too are the same for all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from bench.schedulinglab.scenarios import Workload
from bench.schedulinglab.workload import Ask, Profile
from worker_gpu.engines.simulated_options import SimulationOptions

#: Tells our workers how many seconds a simulated one takes (see http_worker).
SCALE_VARIABLE = "BENCH_TIME_SCALE"
ANSWER_TOKENS = SimulationOptions().answer_bounds


class Texts:
    """The words of it all."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self.profile = lru_cache(None)(self._profile)

    def question(self, ask: Ask) -> str:
        """Return the part of the prompt that is this request's own; no two begin alike."""
        return self._draw(f"question {ask.number} {ask.at}", ask.own_tokens)

    def _profile(self, profile: Profile) -> str:
        return self._draw(profile.name, profile.tokens)

    def _draw(self, seed: str, tokens: int) -> str:
        return " ".join(random.Random(seed).choices(self._words, k=tokens))


def gently(workload: Workload, filling: int, share: float) -> Workload:
    """Return a workload whose first requests, so many, come at a share of their rate, and all others that much later.

    Caches are filled then when it counts, and no system carries along what a cold start under full load has done to it.
    """
    asks = workload.asks
    begin = asks[filling].at if filling < len(asks) else 0.0
    later = begin / share - begin
    moved = [replace(ask, at=ask.at / share if ask.at < begin else ask.at + later) for ask in asks]
    return replace(workload, asks=tuple(moved))


def answer_tokens(ask: Ask) -> int:
    """Return the length of a request's answer."""
    return random.Random(f"answer {ask.number} {ask.at}").randint(*ANSWER_TOKENS)


def agent(profile: Profile) -> str:
    """Return the name of the agent that has this profile."""
    return f"agent-{profile.name[:12]}"
