"""How much a worker takes on: its wish to the queue, from what it has in hand and what its engine has to do.

What makes others wait is the computing of prompts, so requests are admitted by the prompt tokens that the KV cache lacks:

- **Budget.** A request is in flight from its delivery until its first token. What is to be computed of all in flight stays
  within `max_tokens`, about what the engine computes in one step; a worker with nothing in flight takes a request of any size.
  The rest waits in the queue, where priorities, fairness, cancelling and other workers still reach it.
- **Room.** As many requests as the engine runs at once, and none while it has no memory for more: its KV cache is full of
  what runs and of what is in flight, or sequences wait in it that had begun before, and lost their blocks to others.

Nothing here reads a clock or waits, so that the same rules can be driven in virtual time. Any thread may call.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from tasks.queueing.pull import Wish
from worker_gpu.engines.base import EngineLoad
from worker_gpu.prefill_rate import PrefillRate

#: The share of the KV cache that is left to the sequences that run, which grow with each token.
GROWTH: Final = 0.02
#: A profile is told of that has one in so many of the requests that the engine runs at once.
HOT: Final = 8
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Memory:
    """The KV cache, in tokens: how many it holds, and how many of these are not of a prefix that is known.

    Rates are those of loading from RAM and from disk, in tokens a second. 0 is what is not known, or not there.
    """

    capacity_tokens: int = 0
    free_tokens: int = 0
    ram_rate: float = 0.0
    disk_rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Share:
    """Whose a request is, if it is anybody's, and what it shares with others in the KV cache: its profile, of so many tokens."""

    organization: str = ""
    profile: str = ""
    static_tokens: int = 0


NOBODY: Final = Share()


@dataclass(slots=True, eq=False)
class Taken:
    """A request in hand: the tokens of its prompt, and those of them that are to be computed, while it is `in_flight`."""

    prompt_tokens: int
    uncached: int
    share: Share
    in_flight: bool = False


class Admission:
    """What `worker` has in hand, and what it would take; `max_requests` and `max_tokens` are its limits, see above."""

    def __init__(self, worker: str, max_requests: int, max_tokens: int) -> None:
        self.prefill_rate = PrefillRate()
        self._worker = worker
        self.max_requests = max_requests
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._in_hand: set[Taken] = set()
        self._organizations, self._profiles = Counter[str](), Counter[tuple[str, int]]()
        self._load = 0
        self._in_flight, self._not_begun = 0, 0

    def deliver(self, prompt_tokens: int, cached_tokens: int = 0, share: Share = NOBODY) -> Taken:
        """Take a request in hand, of whose prompt so many tokens should be found in the KV cache."""
        taken = Taken(prompt_tokens, max(1, prompt_tokens - cached_tokens), share)
        with self._lock:
            self._in_hand.add(taken)
            self._load += prompt_tokens
            self._organizations[share.organization] += 1
            self._profiles[share.profile, share.static_tokens] += 1
            self._count(taken, in_flight=True)
        return taken

    def pause(self, taken: Taken) -> None:
        """Have a request that waits for something else than the engine not count as in flight."""
        with self._lock:
            self._count(taken, in_flight=False)

    def go_on(self, taken: Taken) -> None:
        """Have it count again, if it is still in hand."""
        with self._lock:
            self._count(taken, in_flight=taken in self._in_hand)

    def begin(self, taken: Taken, cached_tokens: int, prefill_s: float | None, at: float) -> None:
        """Note a request's first token, and what the engine says of its prefill; `at` is now, on any clock in seconds."""
        with self._lock:
            self._count(taken, in_flight=False)
            if prefill_s is not None:
                self.prefill_rate.add(taken.prompt_tokens - cached_tokens, prefill_s, at)

    def end(self, taken: Taken) -> None:
        """Have a request in hand no more, whatever became of it."""
        with self._lock:
            if taken in self._in_hand:
                self._count(taken, in_flight=False)
                self._in_hand.remove(taken)
                self._load -= taken.prompt_tokens
                _take_one(self._organizations, taken.share.organization)
                _take_one(self._profiles, (taken.share.profile, taken.share.static_tokens))

    @property
    def in_hand(self) -> int:
        """Return how many requests were delivered and have not ended."""
        return len(self._in_hand)

    def wish(self, load: EngineLoad, memory: Memory) -> Wish:
        """Return what the worker would take now, given what its engine has to do, and its KV cache."""
        with self._lock:
            return Wish(
                self._worker,
                room=self._room(load, memory.capacity_tokens),
                budget=max(0, self._max_tokens - self._in_flight),
                in_flight=self._in_flight,
                load=self._load,
                prefill_rate=self.prefill_rate.value,
                ram_rate=memory.ram_rate,
                disk_rate=memory.disk_rate,
                free_tokens=_without(memory, self._own_tokens(load, memory.capacity_tokens)).free_tokens,
                seats=self.max_requests,
                organizations=tuple(name for name in self._organizations if name),
                hot=self._hot(),
            )

    def takes_more(self, load: EngineLoad, capacity_tokens: int) -> bool:
        """Tell whether there is anything that the worker could be given; the same as of its wish, for a quarter of the time."""
        with self._lock:
            return self._in_flight < self._max_tokens and self._room(load, capacity_tokens) > 0

    @property
    def places(self) -> int:
        """Return how many more requests the engine could run."""
        return max(0, self.max_requests - len(self._in_hand))

    def beside_running(self, load: EngineLoad, memory: Memory) -> Memory:
        """Return what the KV cache has beside what runs."""
        return _without(memory, self.own_tokens(load, memory.capacity_tokens))

    def own_tokens(self, load: EngineLoad, capacity_tokens: int) -> int:
        """Return how many tokens of the KV cache what runs has for itself: they are no profile's, and not to be had now."""
        with self._lock:
            return self._own_tokens(load, capacity_tokens)

    def _hot(self) -> dict[str, int]:
        return {name: runs for (name, _), runs in self._profiles.items() if name and HOT * runs >= self.max_requests}

    def _own_tokens(self, load: EngineLoad, capacity_tokens: int) -> int:
        # Profiles that have a base in common share it, so this is a little less than there is.
        shared = sum(tokens for _, tokens in self._profiles)
        return max(0, round((load.kv_usage or 0.0) * capacity_tokens) - shared)

    def _room(self, load: EngineLoad, capacity_tokens: int) -> int:
        if self._in_hand and is_full(load, capacity_tokens, self._not_begun, self._in_flight):
            return 0
        return self.places

    def _count(self, taken: Taken, *, in_flight: bool) -> None:
        change = in_flight - taken.in_flight
        self._in_flight += change * taken.uncached
        self._not_begun += change
        taken.in_flight = in_flight


def _without(memory: Memory, tokens: int) -> Memory:
    return replace(
        memory, capacity_tokens=memory.capacity_tokens - tokens, free_tokens=max(0, memory.free_tokens - tokens)
    )


def _take_one(counter: Counter[T], what: T) -> None:
    counter[what] -= 1
    if not counter[what]:
        del counter[what]


def takes_more(wish: Wish) -> bool:
    """Tell whether there is anything that a worker with this wish could be given."""
    return wish.room > 0 and wish.budget > 0


def is_full(load: EngineLoad, capacity_tokens: int, not_begun: int, in_flight: int) -> bool:
    """Tell whether the engine has no memory for more than it has.

    `not_begun` requests, with `in_flight` tokens to be computed, may wait in it without telling so: for the next step.
    """
    if load.waiting > not_begun:
        return True
    if load.kv_usage is None:
        return False
    free = 1 - load.kv_usage - (in_flight / capacity_tokens if capacity_tokens else 0)
    return free < GROWTH
