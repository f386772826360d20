"""How long a request waits before its next attempt: twice as long each time, and never the same for two of them.

A failure that hits many requests at once, such as an engine that died, must not bring all of them back in one instant.
So each waits for a part of its time that is drawn by lot, from a half to the whole.
"""

from __future__ import annotations


def delay_s(attempt: int, chance: float, *, first_s: float = 1.0, max_s: float = 60.0) -> float:
    """Return the wait in seconds after attempt number `attempt` (1 is the first), for a `chance` from 0 to 1.

    `first_s` is the longest wait after the first attempt; it doubles with each one, up to `max_s`.
    """
    # The exponent is bounded because a float is: after 2^60 doublings any first wait has long reached its bound.
    longest_s = min(max_s, first_s * 2.0 ** min(attempt - 1, 60))
    return longest_s * (1 + chance) / 2
