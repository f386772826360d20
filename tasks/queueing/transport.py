"""kombu's Redis transport, with the `gpu` queue kept as one Redis list a profile hash.

To Celery there is one queue, `gpu`, bound to a topic exchange with `gpu.#`. Here, publishing to it appends to the
list of the routing key's hash; consuming blocks on a marker that says "something is ready", then takes the message
under a lease in one script. Losing a marker costs at most one poll interval, and no message is ever only in a socket.

A lease is dropped by the worker's own terminal commit (see `leases`), never by Celery: acknowledging a `gpu` message
here only returns the consumer's credit. So none of the ways in which Celery acknowledges silently can lose a request;
it comes back when its lease ends. A `gpu` message is known by its delivery tag, which gets a prefix on its way to
Celery. Other queues, such as Celery's remote control, are kombu's as they are.
"""

from __future__ import annotations

from typing import Any

import redis
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps, loads

from tasks.queueing.keys import FAMILY, QueueKeys, script

ALIAS = "metaqore-redis"
ROUTING_PREFIX = f"{FAMILY}."
#: Before the delivery tag of a `gpu` message, where Celery has it.
OURS = f"{FAMILY}|"
RESTORED_AT_ONCE = 1000


class QoS(kombu_redis.QoS):
    """Leases: what workers hold, and for how long."""

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
        super().restore_visible(start, num, interval)


class Channel(kombu_redis.Channel):
    """A channel on which the queue `gpu` is a family of lists."""

    QoS = QoS
    do_restore = False
    key_prefix = ""
    lease_s = 60.0
    from_transport_options = (*kombu_redis.Channel.from_transport_options, "key_prefix", "lease_s")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys = QueueKeys(self.key_prefix)
        self.unacked_key = f"{self.key_prefix}unacked"
        self.unacked_index_key = f"{self.key_prefix}unacked_index"
        self.unacked_mutex_key = f"{self.key_prefix}unacked_mutex"
        self._put_script, self._reserve_script, self._restore_script = map(script, ("put", "reserve", "restore"))

    def restore_ended(self) -> int:
        """Put the messages back on their lists whose lease has ended; return how many there were."""
        keys = [self._keys.ready, self._keys.wake, self._keys.leased, self._keys.leases, self._keys.waiting]
        return int(self._run(self._restore_script, keys, [self._keys.lists, self.lease_s, RESTORED_AT_ONCE]))

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        # kombu keeps its routing in Redis, where it can be lost. Ours never changes.
        if exchange == FAMILY:
            return [FAMILY]
        return list(super()._lookup(exchange, routing_key, default))

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        if queue != FAMILY:
            super()._put(queue, message, **kwargs)
            return
        properties = message["properties"]
        profile = properties["delivery_info"]["routing_key"].removeprefix(ROUTING_PREFIX)
        keys = [self._keys.lists + profile, self._keys.ready, self._keys.wake, self._keys.waiting]
        self._run(self._put_script, keys, [profile, properties["delivery_tag"], dumps(message), 0, 0])

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        if queue != FAMILY:
            return super()._get(queue)
        names = ("ready", "wake", "leased", "leases", "refused", "waiting")
        keys = [getattr(self._keys, name) for name in names]
        taken = self._run(self._reserve_script, keys, [self._keys.lists])
        if taken is None:
            raise virtual.base.Empty
        tag, raw = taken
        message = loads(raw)
        message["properties"]["delivery_tag"] = OURS + tag.decode()
        return message

    def _size(self, queue: str) -> int:
        if queue != FAMILY:
            return int(super()._size(queue))
        with self.conn_or_acquire() as client:
            hashes = client.zrange(self._keys.ready, 0, -1)
            with client.pipeline(transaction=False) as pipe:
                for profile in hashes:
                    pipe.llen(self._keys.lists + profile.decode())
                return sum(pipe.execute())

    def _purge(self, queue: str) -> int:
        if queue != FAMILY:
            return int(super()._purge(queue))
        # Requests end by cancelling or expiring, which is recorded. Emptying the list would only lose them.
        raise NotImplementedError("the gpu queue is not purged; cancel its requests instead")

    def _brpop_start(self, timeout: int | None = None) -> None:
        if FAMILY not in self.active_queues:
            super()._brpop_start(timeout)
            return
        self._in_poll = self.client.connection
        self._brpop_sent_at = kombu_redis.monotonic()
        others = [queue for queue in self.active_queues if queue != FAMILY]
        self.client.connection.send_command("BRPOP", self._keys.wake, *others, timeout or self.brpop_timeout)

    def _brpop_read(self, **options: Any) -> bool:
        try:
            reply = self.client.parse_response(self.client.connection, "BRPOP", **options)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        finally:
            self._in_poll = None
        woken = bool(reply) and reply[0].decode() == self._keys.wake
        if reply and not woken:
            self.connection._deliver(loads(reply[1]), reply[0].decode())
            return True
        if self._closing or FAMILY not in self.active_queues:
            if woken:
                # The marker was for a consumer that is no more: the next one gets it.
                with self.conn_or_acquire() as client:
                    if not client.llen(self._keys.wake):
                        client.lpush(self._keys.wake, 1)
            raise virtual.base.Empty
        # With a marker or without one: a marker may have been lost.
        self.connection._deliver(self._get(FAMILY), FAMILY)
        return True

    def _run(self, source: str, keys: list[str], args: list[Any]) -> Any:
        with self.conn_or_acquire() as client:
            return client.register_script(source)(keys=keys, args=args)

    def _get_pool(self, asynchronous: bool = False) -> Any:
        # A channel whose connection died has no connection info left; kombu would fail with AttributeError, which
        # ends the worker, where a connection error makes it reconnect.
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError("the channel's connection is closed")
        return super()._get_pool(asynchronous)


class Transport(kombu_redis.Transport):
    """The transport registered as `metaqore-redis`."""

    Channel = Channel


def is_ours(tag: str) -> bool:
    """Tell whether a delivery tag, as Celery has it, is that of a `gpu` message."""
    return str(tag).startswith(OURS)


def lease_tag(tag: str) -> str:
    """Return the tag under which a `gpu` message is leased."""
    return tag.removeprefix(OURS)


def register() -> None:
    """Make kombu know this transport by its alias."""
    TRANSPORT_ALIASES[ALIAS] = f"{__name__}:Transport"
