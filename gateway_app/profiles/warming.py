"""Pre-warming: a version is computed on workers before requests get it, so that the first of them need not wait for that.

Whoever changes which version requests get has it warmed here first, waits for it, not for long, and then goes on, whatever
came of it: a cold version answers more slowly, and nothing worse. Why it is not warm is said in the answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import redis

from gateway_app.profiles.active import ActiveProfile
from gateway_app.profiles.wishes import Seen, Wanted, Wishes
from tasks.logs import get_logger
from tasks.settings import ProfilesGroup

#: Why fewer copies are warm than were wanted: it is turned off; nothing of the profile is computed once; requests cannot name
#: it; no worker is alive that could; Redis does not answer; so many wait for theirs that this one does not; time ran out.
Why = Literal["off", "nothing_to_cache", "abstract", "no_worker", "queue_unavailable", "many_waiting", "not_in_time"]
#: Changes of one process that wait at once; each holds a thread.
MAX_WAITING = 16
_LOOK_EVERY_S = 0.1
logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Warmth:
    """How warm a version is: `copies` were wanted, of which `workers` have one, after `waited_s` seconds.

    `alive` workers could have one, `computing` were still at it. `why` says why there are fewer than were wanted.
    """

    copies: int
    workers: tuple[str, ...] = ()
    computing: tuple[str, ...] = ()
    alive: int = 0
    waited_s: float = 0.0
    why: Why | None = None


class Warming:
    """Has versions computed. `store` makes a profile's static part known to the workers; without `wishes` it is off.

    `told` hears how far it is, again and again while it waits.
    """

    def __init__(
        self,
        wishes: Wishes | None,
        store: Callable[[str, ActiveProfile], None],
        options: ProfilesGroup,
        told: Callable[[Warmth], None] = lambda _: None,
    ) -> None:
        self._wishes = wishes
        self._store = store
        self._options = options
        self._told = told
        self._places = threading.BoundedSemaphore(MAX_WAITING)

    def warm(self, organization: str, active: ActiveProfile, pinned: int = 0, longest_s: float | None = None) -> Warmth:
        """Have copies of a profile computed, and return when they are, or when it is known that they will not be in time.

        As many are wanted as the settings say, or as many as are `pinned` if those are more. It takes up to `longest_s`
        seconds, or what the settings say.
        """
        copies = max(self._options.warm_copies, pinned) if self._options.warm_copies else 0
        longest_s = self._options.warm_s if longest_s is None else longest_s
        if self._wishes is None or not copies or not longest_s:
            return Warmth(copies, why="off")
        if active.profile.abstract:
            return Warmth(copies, why="abstract")
        if not active.static_token_count:
            return Warmth(copies, why="nothing_to_cache")
        if not self._places.acquire(blocking=False):
            return Warmth(copies, why="many_waiting")
        try:
            return self._wait(self._wishes, organization, active, copies, longest_s)
        finally:
            self._places.release()

    def _wait(self, wishes: Wishes, organization: str, active: ActiveProfile, copies: int, longest_s: float) -> Warmth:
        wanted, began = Wanted.of(organization, active), time.monotonic()
        self._store(organization, active)
        while True:
            waited_s = time.monotonic() - began
            try:
                # Said again each time: Redis may have lost it.
                seen = wishes.say(wanted, copies, max(longest_s - waited_s, _LOOK_EVERY_S))
            except redis.RedisError as error:
                logger.warning("a version becomes active cold: redis does not answer", error=type(error).__name__)
                return Warmth(copies, waited_s=waited_s, why="queue_unavailable")
            warmth = _warmth(seen, waited_s)
            self._told(warmth)
            if warmth.why != "not_in_time" or waited_s >= longest_s:
                return warmth
            time.sleep(min(_LOOK_EVERY_S, longest_s))


def _warmth(seen: Seen, waited_s: float) -> Warmth:
    """Return how far it is. Where fewer workers live than copies are wanted, one on each is all there can be."""
    why: Why | None = None
    if not seen.alive:
        why = "no_worker"
    elif len(seen.holders) < min(seen.copies, seen.alive):
        why = "not_in_time"
    return Warmth(seen.copies, seen.holders, seen.computing, seen.alive, waited_s, why)
