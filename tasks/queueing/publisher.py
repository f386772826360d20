"""The gateway's side of the queue: whether there is room, putting messages in, and asking for those that are missing.

Publishing is one script call, without Celery's producer in between. It is idempotent by the message's tag, so that it may
be repeated when its answer was lost, and it never refuses for want of room: room is asked for before a request is
accepted, and what was accepted gets in. So a few more than the limits may wait, one for each request that is being
accepted at the time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self, cast

import redis

from tasks.errors import QueueFull, QueueUnavailable
from tasks.logs import get_logger
from tasks.queueing.keys import QueueKeys
from tasks.queueing.message import Queued
from tasks.queueing.pull import chain_text
from tasks.queueing.scripts import Scripts
from tasks.queueing.together import Together
from tasks.settings import SchedulingGroup

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How many requests, and how many prompt tokens of them, may wait, in all and of one organization; 0: any number."""

    requests: int = 0
    tokens: int = 0
    requests_per_organization: int = 0
    tokens_per_organization: int = 0

    @classmethod
    def of(cls, scheduling: SchedulingGroup) -> Self:
        """Return the limits that are configured."""
        return cls(
            scheduling.max_waiting,
            scheduling.max_waiting_tokens,
            scheduling.max_waiting_per_organization,
            scheduling.max_waiting_tokens_per_organization,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """How many requests wait, the prompt tokens of them, and how many may (0: any number)."""

    requests: int
    tokens: int
    limits: Limits

    @property
    def share(self) -> float:
        """Return how full the queue is, 1 for full, by whichever limit is nearer."""
        parts = ((self.requests, self.limits.requests), (self.tokens, self.limits.tokens))
        return max((count / most for count, most in parts if most), default=0.0)


class Publisher:
    """Puts messages into the queue."""

    def __init__(
        self, client: redis.Redis, keys: QueueKeys, limits: Limits | None = None, together: Together | None = None
    ) -> None:
        self._client = client
        self._keys = keys
        self._limits = limits or Limits()
        self._scripts = Scripts(together or Together(client), keys)

    def room(self, organization: str, tokens: int) -> None:
        """Return if a request of `tokens` prompt tokens may wait, and Redis would take it.

        Raises QueueFull, which says when there will probably be room, or QueueUnavailable.
        """
        limits = self._limits
        bounds = (limits.requests, limits.tokens, limits.requests_per_organization, limits.tokens_per_organization)
        try:
            wait_s = int(self._scripts.run("room", organization, tokens, *bounds))
        except redis.RedisError as error:
            raise QueueUnavailable from error
        if wait_s:
            raise QueueFull(retry_after_s=wait_s)

    def publish(self, queued: Queued) -> None:
        """Put a message into the queue, unless it is there. Raises QueueUnavailable if Redis did not confirm it.

        It may be there all the same, and may be published again: it is there once.
        """
        header = (queued.list, queued.tag, queued.organization, queued.tokens, queued.head_start_s)
        try:
            self._scripts.run("put", *header, queued.message, queued.static_tokens, chain_text(queued.chain))
        except redis.RedisError as error:
            raise QueueUnavailable from error

    def unknown(self, tags: Collection[str]) -> set[str]:
        """Return those of `tags` whose messages Redis neither queues, nor delays, nor has leased.

        Raises QueueUnavailable if it cannot say, as also a Redis that takes no writes cannot: it may be a replica that
        has not heard of everything.
        """
        if not tags:
            return set()
        try:
            return {tag.decode() for tag in self._scripts.run("unknown", *tags)}
        except redis.RedisError as error:
            raise QueueUnavailable from error

    def withdraw(self, tag: str) -> None:
        """Forget a message that waits: its request has ended. A worker that has it finds that out by itself."""
        try:
            self._scripts.run("withdraw", tag)
        except redis.RedisError:
            logger.warning("a message stays in the queue; the worker that takes it finds its request ended", tag=tag)

    def load(self) -> Load:
        """Return how full the queue is. Raises QueueUnavailable."""
        try:
            counts = self._client.hmget(self._keys.named("counts"), "requests", "tokens")
        except redis.RedisError as error:
            raise QueueUnavailable from error
        requests, tokens = (int(count or 0) for count in cast("list[bytes | None]", counts))
        return Load(requests, tokens, self._limits)

    def stop(self, request_id: str) -> None:
        """Tell the workers that a request they may be running was cancelled. They also look by themselves."""
        try:
            self._client.publish(self._keys.cancels, request_id)
        except redis.RedisError:
            logger.warning("a worker hears of a cancel later", request_id=request_id)
