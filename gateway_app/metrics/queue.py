"""The queue as a gateway tells it: asked of Redis when somebody asks, and not more often than every few seconds.

Whoever scrapes must neither load Redis nor wait for one that hangs. So one thread asks, over a connection of its own with
short time-outs; what it hears is everybody's for a while, and who has waited long enough is told that the queue is down.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

import redis
from prometheus_client.core import Metric

from gateway_app.housekeeping.leadership import somebody_leads
from gateway_app.kv_cache.fleet import Fleet
from tasks.metrics import gateway as metrics
from tasks.queueing.depth import Depth, depth
from tasks.queueing.heartbeats import workers
from tasks.queueing.keys import QueueKeys
from tasks.queueing.publisher import Limits

#: Time-out of a command, and of connecting.
TIMEOUT_S = 1.0
#: How long what was heard is told again.
KEPT_S = 5.0
#: How long who asks waits at most.
PATIENCE_S = 2.0
WORKER_STATES = ("loading", "ready", "draining", "dead")


@dataclass(frozen=True, slots=True)
class _Heard:
    depth: Depth
    workers: Counter[str]
    leads: bool
    wanted: int
    caches: dict[tuple[str, ...], float]


class QueueReadings:
    """Looks up the queue; `connect` makes the client of it."""

    def __init__(self, connect: Callable[[], redis.Redis], keys: QueueKeys, limits: Limits) -> None:
        self._connect, self._keys, self._limits = connect, keys, limits
        self._client: redis.Redis | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="queue-metrics")
        self._lock = threading.Lock()
        self._asked: Future[_Heard | None] | None = None
        self._asked_at = 0.0

    def describe(self) -> Iterable[Metric]:
        """Have nothing looked up before somebody asks."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Tell the queue's state, or that it is down."""
        limits = {("requests",): self._limits.requests, ("tokens",): self._limits.tokens}
        yield metrics.QUEUE_LIMIT.by({what: most for what, most in limits.items() if most})
        heard = self._heard()
        yield metrics.QUEUE_UP.now(heard is not None)
        if heard is not None:
            yield from _told(heard)

    def close(self) -> None:
        """End the thread and its connection; nobody may ask any more."""
        self._thread.shutdown()
        if self._client is not None:
            self._client.close()

    def _heard(self) -> _Heard | None:
        with self._lock:
            now = time.monotonic()
            if self._asked is None or (self._asked.done() and now - self._asked_at >= KEPT_S):
                self._asked, self._asked_at = self._thread.submit(self._ask), now
            asked = self._asked
        try:
            return asked.result(PATIENCE_S)
        except (TimeoutError, CancelledError):
            return None

    def _ask(self) -> _Heard | None:
        try:
            if self._client is None:
                self._client = self._connect()
            states = Counter(str(worker["state"]) for worker in workers(self._client, self._keys))
            leads = somebody_leads(self._client, self._keys.prefix)
            wanted = self._client.hlen(self._keys.named("wanted"))
            caches = _caches(Fleet(self._client, self._keys))
            return _Heard(depth(self._client, self._keys), states, leads, wanted, caches)
        except redis.RedisError:
            return None


def _caches(fleet: Fleet) -> dict[tuple[str, ...], float]:
    facts = [worker.facts for worker in fleet.workers()[1]]
    return {
        ("capacity",): sum(each.capacity_tokens for each in facts),
        ("known",): sum(each.known_tokens for each in facts),
        ("free",): sum(each.free_tokens for each in facts),
    }


def _told(heard: _Heard) -> Iterator[Metric]:
    queue = heard.depth
    yield metrics.QUEUE_REQUESTS.by({(priority,): count for priority, count in queue.requests.items()})
    yield metrics.QUEUE_OLDEST.by({(priority,): seconds for priority, seconds in queue.oldest_s.items()})
    yield metrics.QUEUE_TOKENS.now(queue.tokens)
    yield metrics.QUEUE_DELAYED.now(queue.delayed)
    yield metrics.QUEUE_LEASED.now(queue.leased)
    yield metrics.QUEUE_RENEWED.now(queue.oldest_renewal_s)
    yield metrics.WORKERS.by({(state,): heard.workers[state] for state in WORKER_STATES})
    yield metrics.HOUSEKEEPER_LEADS.now(heard.leads)
    yield metrics.WANTED.now(heard.wanted)
    yield metrics.CACHE_TOKENS.by(heard.caches)
