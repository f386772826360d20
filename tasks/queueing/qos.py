"""What Celery's acknowledging does to a `gpu` message: it returns the consumer's credit, and nothing else.

A message is known to be one of the `gpu` queue by the beginning of its delivery tag, as Celery has it. Those of other queues
are kombu's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from tasks.queueing.keys import FAMILY

#: Before the delivery tag of a `gpu` message, where Celery has it.
OURS = f"{FAMILY}|"


def is_ours(tag: str) -> bool:
    """Tell whether a delivery tag, as Celery has it, is that of a `gpu` message."""
    return str(tag).startswith(OURS)


@contextmanager
def as_connection_errors() -> Iterator[None]:
    """Make a refusal of Redis (it has become a replica, or its disk is full) a reason to connect anew, not to end."""
    try:
        yield
    except redis.ResponseError as error:
        raise redis.ConnectionError(str(error)) from error


class QoS(kombu_redis.QoS):  # type: ignore[misc]  # kombu has no types
    """Credit: how many messages the consumer may still be given."""

    # Closing a channel must not give back what a worker still runs: it would run twice.
    restore_at_shutdown = False

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a delivered message. A `gpu` message's lease was written when it was taken."""
        if is_ours(delivery_tag):
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Return the consumer's credit; a `gpu` message stays leased until its request ends."""
        if is_ours(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Return the credit; a `gpu` message that Celery refuses comes back when its lease ends, not in a hot loop."""
        if is_ours(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().reject(delivery_tag, requeue=requeue)

    def restore_unacked(self, client: Any = None) -> None:
        """Give back what is not ours: a `gpu` message is still being run."""
        for tag in [tag for tag in self._delivered if not is_ours(tag)]:
            self.restore_by_tag(tag, client=client)
            del self._delivered[tag]

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Give back the messages whose lease has ended: their worker is gone."""
        self.channel.restore_ended()
        with as_connection_errors():
            super().restore_visible(start, num, interval)
