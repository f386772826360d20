"""The transports by which Celery reaches the queue: kombu's for Redis and for Sentinels, over channels of our own."""

from __future__ import annotations

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis

from tasks.queueing.channel import Channel, SentinelChannel

ALIAS = "metaqore-redis"
#: The same, where the servers in the URL are Sentinels: kombu knows them by this scheme alone, so ours takes its place.
SENTINEL_ALIAS = "sentinel"


class Transport(kombu_redis.Transport):
    """The transport registered as `metaqore-redis`."""

    Channel = Channel


class SentinelTransport(kombu_redis.SentinelTransport):
    """The transport registered as `sentinel`."""

    Channel = SentinelChannel


def register() -> None:
    """Make kombu know these transports by their aliases."""
    TRANSPORT_ALIASES[ALIAS] = f"{__name__}:Transport"
    TRANSPORT_ALIASES[SENTINEL_ALIAS] = f"{__name__}:SentinelTransport"
