"""What a worker says to the queue: what it would take now, and what its KV cache holds.

Workers pull. Each time a worker has room it sends a wish, and the queue's script picks the requests that are best run
there (docs/scheduling.md). What the worker's cache holds is known to the queue from reports: a full one first, then what
changed, numbered without a gap, within an epoch that begins with the worker's process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.job import Chain

Strategy = Literal["cache_aware_continuous", "least_loaded", "round_robin", "fifo"]
#: Tokens of a link's prefix on the GPU; there or in RAM; there, in RAM or on disk.
Held = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a worker would take now.

    `room` is how many requests it can take. `budget` is how many prompt tokens it may begin to compute, of which
    `in_flight` are begun already; with nothing in flight it takes a request of any size. `load` is the number of tokens in
    hand. Rates are in tokens a second: of computing, and of loading from RAM and from disk (0: it has no such tier).
    `free_tokens` of the KV cache can be had without evicting a prefix that is known. It can run `seats` requests at once; those in
    hand are of `organizations`, and of the profiles in `hot` it has so many each that others might share the work.
    """

    worker: str
    room: int
    budget: int
    in_flight: int = 0
    load: int = 0
    prefill_rate: float = 25_000.0
    ram_rate: float = 0.0
    disk_rate: float = 0.0
    free_tokens: int = 0
    affinity: float = 32.0
    patience: float = 4.0
    seats: int = 0
    organizations: tuple[str, ...] = ()
    hot: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as the script reads it."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker's cache holds: all of it if `full`, else what changed since the report before.

    `cache` has what is held of each link's prefix; nothing of one that is gone. `facts` are shown to people, and `served` are
    the output tokens by organization since the report before.
    """

    worker: str
    epoch: str
    number: int
    full: bool
    cache: Mapping[str, Held] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    served: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as the script reads it."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}, separators=(",", ":"))


def chain_text(chain: Chain) -> str:
    """Return the inner links of a profile's chain as the queue keeps them."""
    return " ".join(f"{link}:{tokens}" for link, tokens in chain)
