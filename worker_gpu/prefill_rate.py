"""How fast an engine computes prompts, measured from what it says of each request's prefill.

Prompts that are computed in one step each take as long as the step. So those whose first tokens come together are one
measurement: the tokens of all of them, over the longest of their times.

A step also takes time for what it decodes, whatever it prefills, and a short prompt hardly tells how long a long one would
take, which is what the rate is wanted for. So a measurement weighs as much as it has tokens: in both sums, of tokens and of
seconds, it is multiplied by them. The past fades with the weight of what is new.
"""

from __future__ import annotations

from typing import Final

#: Before anything is measured: an 8B model on one H100 (docs/simulation.md).
START_RATE: Final = 25_000.0
#: The start counts as much as one prompt of so many tokens, and the past half as much for every prompt of this length.
_START_TOKENS: Final = 1000
_HALVING_TOKENS: Final = 10_000
#: First tokens that come so close after one another, in seconds, are of one step: no step is as short.
_TOGETHER_S: Final = 0.002


class PrefillRate:
    """A running mean of tokens a second."""

    def __init__(self) -> None:
        self._weighed_tokens = float(_START_TOKENS**2)
        self._weighed_s = _START_TOKENS**2 / START_RATE
        self._tokens, self._seconds, self._at = 0, 0.0, 0.0

    @property
    def value(self) -> float:
        """Return the rate."""
        tokens, seconds = self._with_last()
        return tokens / seconds

    def add(self, tokens: int, seconds: float, at: float) -> None:
        """Add that so many tokens were computed in so many seconds, up to the instant `at`, on any clock in seconds."""
        if tokens <= 0 or seconds <= 0:
            return
        if at - self._at > _TOGETHER_S:
            self._weighed_tokens, self._weighed_s = self._with_last()
            self._tokens, self._seconds = 0, 0.0
        self._tokens, self._seconds, self._at = self._tokens + tokens, max(self._seconds, seconds), at

    def _with_last(self) -> tuple[float, float]:
        """Return the two sums, with the measurement that may not be complete yet."""
        kept = 0.5 ** ((self._tokens / _HALVING_TOKENS) ** 2)
        return (
            self._weighed_tokens * kept + self._tokens * self._tokens,
            self._weighed_s * kept + self._tokens * self._seconds,
        )
