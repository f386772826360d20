"""A Celery consumer that is back soon after Redis is.

kombu tries again after 2 s, 4 s and so on, up to half a minute: a worker would stand idle for as long again as Redis was
away. One attempt to connect costs nothing, so ours come at short and equal intervals.
"""

from __future__ import annotations

import functools
from typing import Any

from celery.worker.consumer.consumer import Consumer as CeleryConsumer

INTERVAL_S = 0.5


class Consumer(CeleryConsumer):
    """Celery's consumer, which tries to connect every `INTERVAL_S` seconds."""

    def ensure_connected(self, conn: Any) -> Any:
        """Return the connection once it is made."""
        conn.ensure_connection = functools.partial(
            conn.ensure_connection, interval_start=INTERVAL_S, interval_step=0, interval_max=INTERVAL_S
        )
        return super().ensure_connected(conn)
