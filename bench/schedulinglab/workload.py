"""Profiles, and requests that ask for them.

Every prompt is a profile, which many requests share, and a dynamic part that is a request's own. Token ids stand for
nothing; only which of them are equal matters. A profile may begin with a base that others begin with, too.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tasks.job import Sampling
from worker_gpu.engines.base import GenerationRequest

#: Static token ids are below this, dynamic ones are not.
VOCABULARY = 50_000
#: An answer's length is the simulated engine's choice; nobody here cuts it off.
MAX_TOKENS = 1_000
LINK_DIGITS = 32
SALT = "bench"


@dataclass(frozen=True)
class Profile:
    """A static part. `segments` are (name, tokens): equal names before equal names mean equal tokens.

    Profiles that share a base have their first segment in common.
    """

    segments: tuple[tuple[str, int], ...]

    @cached_property
    def name(self) -> str:
        """Return the profile's hash, 64 hex digits."""
        return self._digest(len(self.segments))

    @cached_property
    def tokens(self) -> int:
        """Return the length of the whole static part."""
        return sum(tokens for _, tokens in self.segments)

    @cached_property
    def chain(self) -> tuple[tuple[str, int], ...]:
        """Return the inner links: each by the beginning of its hash, with the tokens from the prompt's start to its end."""
        ends = itertools.accumulate(tokens for _, tokens in self.segments[:-1])
        return tuple((self._digest(count)[:LINK_DIGITS], end) for count, end in enumerate(ends, 1))

    @cached_property
    def links(self) -> tuple[tuple[str, int], ...]:
        """Return the chain, and the profile's own link."""
        return (*self.chain, (self.name, self.tokens))

    @cached_property
    def token_ids(self) -> list[int]:
        """Return the static part's token ids."""
        ids: list[int] = []
        for count, (_, tokens) in enumerate(self.segments, 1):
            chance = random.Random(self._digest(count))
            ids += chance.choices(range(VOCABULARY), k=tokens)
        return ids

    def _digest(self, segments: int) -> str:
        return hashlib.sha256("/".join(name for name, _ in self.segments[:segments]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: when it arrives, in seconds, and what for. `own_tokens` is the length of its dynamic part."""

    number: int
    at: float
    profile: Profile
    own_tokens: int
    organization: str = "acme"

    @property
    def tokens(self) -> int:
        """Return the length of the whole prompt."""
        return self.profile.tokens + self.own_tokens

    def to_engine(self) -> GenerationRequest:
        """Return what the engine is given. It is made late, since 6,000 token ids take 50 KB."""
        first = VOCABULARY + self.number * 1_000
        ids = [*self.profile.token_ids, *range(first, first + self.own_tokens)]
        sampling = Sampling(seed=self.number, max_tokens=MAX_TOKENS)
        return GenerationRequest(str(self.number), ids, sampling, f"{SALT}:{self.organization}")


def profiles(count: int, tokens: int, *, label: str = "profile") -> list[Profile]:
    """Return profiles that share nothing."""
    return [Profile(((f"{label} {number}", tokens),)) for number in range(count)]


def zipf(chance: random.Random, choices: Sequence[Profile], exponent: float) -> Iterator[Profile]:
    """Give profiles for ever: the one of rank r with weight r ** -exponent. Rank is the order of `choices`."""
    weights = list(itertools.accumulate(rank**-exponent for rank in range(1, len(choices) + 1)))
    while True:
        yield from chance.choices(choices, cum_weights=weights, k=1_000)


def poisson(chance: random.Random, rate: float) -> Iterator[float]:
    """Give arrival times for ever, `rate` a second on average, independent of one another."""
    now = 0.0
    while True:
        now += chance.expovariate(rate)
        yield now
