"""Workers say that they live, in keys that end by themselves when they stop saying so."""

from __future__ import annotations

import json
from typing import Any, cast

import redis

from tasks.queueing.keys import QueueKeys

INTERVAL_S = 2.0
TTL_S = 15


def workers(client: redis.Redis, keys: QueueKeys) -> list[dict[str, Any]]:
    """Return what each live worker last said: `worker`, `state` (`loading`, `ready`, `draining`), `model`, `running`.

    Raises redis.RedisError.
    """
    names = [name.decode() for name in cast("set[bytes]", client.smembers(keys.workers))]
    if not names:
        return []
    values = client.mget([keys.heartbeat(name) for name in names])
    gone = [name for name, value in zip(names, values, strict=True) if value is None]
    if gone:
        client.srem(keys.workers, *gone)
    return [json.loads(value) for value in values if value is not None]
