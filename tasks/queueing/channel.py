"""kombu's Redis channel, with the `gpu` queue kept as one Redis list a profile hash.

To Celery there is one queue, `gpu`, bound to a topic exchange with `gpu.#`. Here, publishing to it appends to the
list of the routing key's hash; consuming blocks on a marker that says "look", then takes the messages that this worker had
best run, under leases, in one script. Losing a marker costs at most one poll interval, and so does a delayed message that
falls due while nothing else happens; no message is ever only in a socket.

A lease is ended by the worker alone (see `leases`), never by Celery: acknowledging a `gpu` message here only returns the
consumer's credit. So none of the ways in which Celery acknowledges silently can lose a request; it comes back when its
lease ends. Other queues, such as Celery's remote control, are kombu's as they are, below the same key prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import redis
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import dumps, loads
from redis.backoff import NoBackoff
from redis.retry import Retry

from tasks.logs import get_logger
from tasks.metrics import worker as metrics
from tasks.queueing.keys import FAMILY, QueueKeys
from tasks.queueing.leases import grace_s, process_holder
from tasks.queueing.properties import message_of
from tasks.queueing.pull import Strategy, Wish
from tasks.queueing.qos import QoS, as_connection_errors
from tasks.queueing.scripts import Argument, Scripts

logger = get_logger(__name__)
ROUTING_PREFIX = f"{FAMILY}."
RESTORED_AT_ONCE = 1000
#: What the names of lists of markers begin with, below the prefix.
WAKES = f"{FAMILY}:wake"
_OPTIONS = ("lease_s", "holder", "strategy")
_ANY_TOKENS = 10**12


class Channel(kombu_redis.Channel):
    """A channel on which the queue `gpu` is a family of lists."""

    QoS = QoS
    do_restore = False
    lease_s = 60.0
    #: Under which name this channel takes leases; empty for the process's own.
    holder = ""
    strategy: Strategy = "cache_aware_continuous"
    from_transport_options = (*kombu_redis.Channel.from_transport_options, *_OPTIONS)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys = QueueKeys(self.global_keyprefix)
        self.holder = self.holder or process_holder()
        self._asked: tuple[redis.Redis, Scripts] | None = None
        #: Who consumes, to the queue, and what it would take now. Without a worker behind it, one message at a time.
        self.worker = self.holder
        self.wish: Callable[[], Wish] = self._plain_wish
        #: Has `look_again` called in so many seconds; without it, a read blocks for no longer than that.
        self.call_later: Callable[[float], None] | None = None
        #: Whether something waits that this consumer was not given, for want of room or because it is another's.
        self.left = False
        self._next_s: float | None = None
        self._look_at_once = True
        self._asked_with = "BRPOP"

    def look_again(self) -> None:
        """Have this consumer look again, since it has room or something is due. For the thread that consumes."""
        if not self._in_poll:
            self._look_at_once = True
        elif self.left:
            self._mark(self._keys.wake_of(self.worker))

    def restore_ended(self) -> int:
        """Put the messages back on their lists whose lease has ended; return how many there were."""
        return int(self._run("restore", self.lease_s, RESTORED_AT_ONCE, grace_s(self.lease_s)))

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        # kombu keeps its routing in Redis, where it can be lost. Ours never changes.
        if exchange == FAMILY:
            return [FAMILY]
        return list(super()._lookup(exchange, routing_key, default))

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        if exchange == FAMILY:
            return
        with as_connection_errors():
            try:
                super()._queue_bind(exchange, routing_key, pattern, queue)
            except redis.OutOfMemoryError:
                # A worker must be able to begin, or a full Redis would never become emptier. What needs this binding, such as
                # answers to remote control, waits until there is memory again.
                logger.warning("redis has no memory left to bind a queue", queue=queue)

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:
        if queue != FAMILY:
            super()._put(queue, message, **kwargs)
            return
        properties = message["properties"]
        profile = properties["delivery_info"]["routing_key"].removeprefix(ROUTING_PREFIX)
        self._run("put", profile, properties["delivery_tag"], "", 0, 0, dumps(message), 0, "")

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        if queue != FAMILY:
            return super()._get(queue)
        messages = self._reserve(replace(self.wish(), room=1))
        if not messages:
            raise virtual.base.Empty
        return messages[0]

    def _reserve(self, wish: Wish) -> list[dict[str, Any]]:
        """Take what this worker had best run now, and note when it should look again."""
        taken, next_s, decision, left = self._run("reserve", self.holder, wish.to_json())
        self.left, self._next_s = bool(left), float(next_s) if next_s else None
        self._look_at_once = bool(taken and left)
        messages = [self._read(tag, record, returns, decision) for tag, record, returns in taken]
        return [message for message in messages if message is not None]

    def _read(self, tag: bytes, record: bytes, returns: int, decision: bytes) -> dict[str, Any] | None:
        """Return a message as Celery has it; one that cannot be read is set aside."""
        try:
            message = message_of(tag, record, returns, decision)
            # Celery makes one too, in its own loop, where a fault would end the worker.
            self.Message(message, channel=self)
        except Exception as error:
            # Whatever it is, somebody put it there to be read, and it cannot be.
            logger.error(
                "a message cannot be read, and is set aside",
                tag=tag.decode("ascii", "replace"),
                error=type(error).__name__,
            )
            metrics.REFUSED.inc()
            self._run("refuse", self.holder, tag, f"cannot be read: {type(error).__name__}")
            return None
        return message

    def _plain_wish(self) -> Wish:
        return Wish(self.holder, room=1, budget=_ANY_TOKENS)

    def _size(self, queue: str) -> int:
        if queue != FAMILY:
            return int(super()._size(queue))
        with self._asking() as (client, _scripts):
            return int(cast("bytes | None", client.hget(self._keys.named("counts"), "requests")) or 0)

    def _purge(self, queue: str) -> int:
        if queue != FAMILY:
            return int(super()._purge(queue))
        # Requests end by cancelling or expiring, which is recorded. Emptying the list would only lose them.
        raise NotImplementedError("the gpu queue is not purged; cancel its requests instead")

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        # Deleting the queue takes no message, and its binding is a constant.
        if queue != FAMILY:
            super()._delete(queue, *args, **kwargs)

    def _brpop_start(self, timeout: int | None = None) -> None:
        if FAMILY not in self.active_queues:
            super()._brpop_start(timeout)
            return
        self._in_poll = self.client.connection
        self._brpop_sent_at = kombu_redis.monotonic()
        if self._look_at_once:
            # Answered at once, with the marker or without one.
            self._look_at_once = False
            self._asked_with = "LPOP"
            self.client.connection.send_command("LPOP", self._keys.wake_of(self.worker))
            return
        wait_s = timeout or self.brpop_timeout
        if (next_s := self._next_s) is not None and next_s < wait_s:
            self._next_s = None
            if self.call_later is not None:
                # Redis looks at its time-outs ten times a second only.
                self.call_later(next_s)
            else:
                wait_s = max(next_s, 0.01)
        others = [self.global_keyprefix + queue for queue in self.active_queues if queue != FAMILY]
        wakes = (self._keys.wake_of(self.worker), self._keys.wake)
        self._asked_with = "BRPOP"
        self.client.connection.send_command("BRPOP", *wakes, *others, wait_s)

    def _brpop_read(self, **options: Any) -> bool:
        try:
            # Without its own prefix: kombu's client takes it off.
            reply = self.client.parse_response(self.client.connection, self._asked_with, **options)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        except redis.ResponseError as error:
            self.client.connection.disconnect()
            raise redis.ConnectionError(str(error)) from error
        finally:
            self._in_poll = None
        # A list's name comes with what was in it; the answer to a look at once has none.
        queue = reply[0].decode() if isinstance(reply, tuple) else None
        if queue is not None and not queue.startswith(WAKES):
            self.connection._deliver(loads(reply[1]), queue)
            return True
        if self._closing or FAMILY not in self.active_queues:
            if reply:
                # The marker was for a consumer that is no more: the next one gets it.
                self._mark(self._keys.wake)
            raise virtual.base.Empty
        # With a marker or without one: a marker may have been lost.
        messages = self._reserve(self.wish())
        if not messages:
            raise virtual.base.Empty
        for message in messages:
            self.connection._deliver(message, FAMILY)
        return True

    def _mark(self, wake: str) -> None:
        """Put a marker into a list, unless one is there."""
        with self._asking() as (client, _scripts):
            if not client.llen(wake):
                client.lpush(wake, 1)

    def _run(self, name: str, *arguments: Argument) -> Any:
        with self._asking() as (_client, scripts):
            return scripts.run(name, *arguments)

    @contextmanager
    def _asking(self) -> Iterator[tuple[redis.Redis, Scripts]]:
        """Give a client that leaves keys as they are, as ours have their prefix, and the scripts over it."""
        if self._asked is None or self._asked[0].connection_pool is not self.pool:
            client = redis.Redis(connection_pool=self.pool)
            self._asked = client, Scripts(client, self._keys, self.strategy)
        with as_connection_errors():
            yield self._asked

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        # To repeat a reservation whose answer was lost would take a second message while the first waits for its
        # lease to end, and waiting for that would hold up Celery's loop. Celery connects anew instead.
        return {**super()._connparams(asynchronous), "retry": Retry(NoBackoff(), 0)}

    def _get_pool(self, asynchronous: bool = False) -> Any:
        # A channel whose connection died has no connection info left; kombu would fail with AttributeError, which
        # ends the worker, where a connection error makes it reconnect.
        if self.connection is None or self.connection.client is None:
            raise redis.ConnectionError("the channel's connection is closed")
        return super()._get_pool(asynchronous)


class SentinelChannel(Channel, kombu_redis.SentinelChannel):
    """The same, on the server that Sentinel names."""

    from_transport_options = (*kombu_redis.SentinelChannel.from_transport_options, *_OPTIONS)
