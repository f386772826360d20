"""How deep the queue is and how it fares, for whoever watches it: cheap, however long the queue is.

Numbers come from the queue's own counters. The age of a priority's oldest request comes from the lists that are ready, in
the order of their turns: of the first ones, up to a thousand, the first of each priority holds its oldest request. If
none of a priority is among them, though some wait, theirs is no older than the last list looked at would make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_args

import redis

from tasks.job import Priority
from tasks.queueing.keys import HEAD_START_S, QueueKeys, priority_of

PRIORITIES: Final[tuple[Priority, ...]] = get_args(Priority)
#: Lists that are looked at, at most.
LISTS_AT_MOST = 1000


@dataclass(frozen=True, slots=True)
class Depth:
    """The queue at one instant: `requests` wait, by priority, `oldest_s` for how long at most, in seconds.

    `delayed` are those of them that are given back and not due yet. `leased` are with workers; the lease that was
    renewed longest ago was so `oldest_renewal_s` ago.
    """

    requests: Mapping[Priority, int]
    oldest_s: Mapping[Priority, float]
    tokens: int
    delayed: int
    leased: int
    oldest_renewal_s: float


def depth(client: redis.Redis, keys: QueueKeys) -> Depth:
    """Look at the queue. Raises redis.RedisError."""
    counters = ["tokens", *(f"priority {priority}" for priority in PRIORITIES)]
    with client.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.hmget(keys.named("counts"), counters)
        pipe.zrange(keys.named("ready"), 0, LISTS_AT_MOST - 1, withscores=True)
        pipe.zcard(keys.named("delayed"))
        pipe.zcard(keys.named("leases"))
        pipe.zrange(keys.named("leases"), 0, 0, withscores=True)
        (seconds, microseconds), counts, ready, delayed, leased, renewed = pipe.execute()
    now = seconds + microseconds / 1e6
    tokens, *waiting = (int(count or 0) for count in counts)
    requests = dict(zip(PRIORITIES, waiting, strict=True))
    return Depth(
        requests=requests,
        oldest_s={priority: _oldest_s(priority, ready, now) if requests[priority] else 0.0 for priority in PRIORITIES},
        tokens=tokens,
        delayed=delayed,
        leased=leased,
        oldest_renewal_s=max(0.0, now - renewed[0][1]) if renewed else 0.0,
    )


def _oldest_s(priority: Priority, ready: list[tuple[bytes, Any]], now: float) -> float:
    """Return for how long the oldest of a priority has waited, of lists with the turns of their first messages."""
    turns = (turn for name, turn in ready if priority_of(name.decode("utf-8", "replace")) == priority)
    turn = next(turns, ready[-1][1] if len(ready) == LISTS_AT_MOST else None)
    # Its turn is when it was put, less its head start.
    return 0.0 if turn is None else max(0.0, now - turn - HEAD_START_S[priority])
