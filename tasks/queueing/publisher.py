"""Publishing a job: one script call on one connection, without Celery's producer in between.

Building Celery's envelope ourselves costs a fifth of `apply_async`, and lets the append, the ready index and the
wake-up be one atomic step.
"""

from __future__ import annotations

import redis

from tasks.errors import QueueUnavailable
from tasks.job import Job
from tasks.queueing.keys import QueueKeys, script
from tasks.queueing.message import MessageCodec, delivery_tag


class Publisher:
    """Puts jobs on their profile's list."""

    def __init__(self, client: redis.Redis, keys: QueueKeys, codec: MessageCodec) -> None:
        self._client = client
        self._keys = keys
        self._codec = codec
        self._put = client.register_script(script("put"))

    def publish(self, job: Job, wrapped_key: bytes) -> None:
        """Append the job's message. Raises QueueUnavailable if Redis did not confirm it."""
        message = self._codec.encode(job, wrapped_key)
        profile = job.prompt.static_profile_hash
        try:
            self._put(
                keys=[self._keys.lists + profile, self._keys.ready, self._keys.wake],
                args=[profile, delivery_tag(job), message],
            )
        except redis.RedisError as error:
            raise QueueUnavailable from error

    def check(self) -> None:
        """Raise QueueUnavailable unless Redis answers and takes writes."""
        try:
            self._client.ping()
        except redis.RedisError as error:
            raise QueueUnavailable from error


def connect(url: str, timeout_s: float, **options: object) -> redis.Redis:
    """Return a client that never repeats a command by itself: a script that ran twice would queue twice."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=min(timeout_s, 3.0),
        socket_keepalive=True,
        health_check_interval=10,
        retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
        **options,
    )
