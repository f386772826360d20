"""The names of the queue's keys in Redis, and the scripts that change them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from tasks.job import Priority
from tasks.queueing.pull import Strategy

#: The Celery queue GPU workers consume, and the topic exchange it is bound to with `gpu.#`.
FAMILY = "gpu"
TASK_NAME = "metaqore.generate"
#: How far ahead of its time a message's turn comes. It is bounded, so that waiting always wins in the end.
HEAD_START_S: dict[Priority, int] = {"high": 30, "normal": 0, "low": -60}
_SCRIPTS = Path(__file__).parent
#: The keys that every script is given, in the order in which common.lua names them.
_OF_SCRIPTS = (
    *("messages", "ready", "leases", "holders", "delayed", "returns"),
    *("counts", "rate", "sweeps", "wake", "refused", "probe"),
    *("lists", "sums", "served", "alive", "idle", "facts", "fills"),
)


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """Keys below one prefix. All times in them are Redis's own, in seconds.

    `messages` is a hash with what every message is, by its delivery tag. Each message is in exactly one place: it
    waits in a list, is in the sorted set `delayed` by when it is due, or is leased: in the sorted set `leases` by when
    that was last renewed. `holders` says which process took it last, `returns` how often it was given back.

    Each profile has a list for each priority it is asked with; an element is "<turn> <tag>". `ready` is a sorted set
    of the names of the lists, by the turn of their first element. `counts` has the numbers of requests and of
    their prompt tokens that wait or are delayed, in all and by organization, and of the requests by priority; `rate` how
    fast they leave. `wake` is a list with at most one marker, on which idle workers block; `sweeps` says since when ended leases are looked for
    without a gap; `refused` is a list of the last hundred elements that were no messages. `probe` never exists: writing
    nothing to it shows whether Redis takes writes.

    `ready:<organization>` is an organization's part of `ready`, and `served` a sorted set of the organizations by the tokens
    they were served. `lists` has of each list that is not empty what its profile is, `sums` the sum of the times at which what
    waits in it came.

    Workers are in `alive` by when they were last heard of, in `idle` by their load if they have room, and in `facts` with their
    last report. `cache:<worker>` is a hash of what its KV cache holds of each link, `hot:<worker>/<organization>` a
    sorted set of the lists that are ready whose profiles it holds, `copies:<profile>` a hash of the workers that hold it or are computing it, which `fills` has by when that is given up,
    `runs:<profile>` one of how many requests each of them ran lately with it. `wake:<worker>` is its own list for a marker.

    `wanted` is a hash of the profiles that workers shall have computed, `awaited` a sorted set of those wishes that end, by when.
    """

    prefix: str

    @property
    def of_scripts(self) -> list[str]:
        """Return the keys that every script is given."""
        return [self.named(name) for name in _OF_SCRIPTS]

    def named(self, name: str) -> str:
        """Return the key of the queue that is called `name`."""
        return f"{self.prefix}{FAMILY}:{name}"

    @property
    def root(self) -> str:
        """Return what all keys of the queue begin with."""
        return self.named("")

    @property
    def lists(self) -> str:
        """Return what comes before the name of a list."""
        return self.named("list:")

    def wake_of(self, worker: str) -> str:
        """Return the list that holds the marker of one worker."""
        return self.named(f"wake:{worker}")

    @property
    def wake(self) -> str:
        """Return the list that holds the wake marker."""
        return self.named("wake")

    @property
    def cancels(self) -> str:
        """Return the channel on which workers hear of requests to stop."""
        return f"{self.prefix}cancel"

    @property
    def workers(self) -> str:
        """Return the set of the names of workers that may be alive."""
        return f"{self.prefix}workers"

    def heartbeat(self, worker: str) -> str:
        """Return the key in which a worker says that it lives."""
        return f"{self.prefix}worker:{worker}"


def list_name(static_profile_hash: str, priority: Priority) -> str:
    """Return which list a message goes to."""
    return static_profile_hash if priority == "normal" else f"{static_profile_hash}:{priority}"


def priority_of(name: str) -> Priority:
    """Return the priority of a list's messages, by its name."""
    suffix = name.rpartition(":")[2]
    return next((priority for priority in HEAD_START_S if priority == suffix), "normal")


#: The scripts that ask a strategy.
_DECIDING = ("reserve", "replay")


@functools.cache
def script(name: str, strategy: Strategy = "cache_aware_continuous") -> str:
    """Return the source of one of the Lua scripts beside this module, with what it needs before it.

    That is what all of them share, the strategy if it decides, and what it looks at if it reserves.
    """
    parts = [_read("common")]
    if name in _DECIDING:
        parts += [f"local STRATEGY = '{strategy}'\n", _read(f"strategies/{strategy}")]
    if name == "reserve":
        parts.append(_read("looking"))
    return "".join([*parts, _read(name)])


def _read(name: str) -> str:
    return (_SCRIPTS / f"{name}.lua").read_text("utf-8")
