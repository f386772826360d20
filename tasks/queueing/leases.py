"""Leases: a worker's hold on the messages it is running.

A lease belongs to a message and a process, not to a connection. A thread with a connection of its own renews all that this
process holds, often: so a long request keeps its lease however short leases are, and a dead process loses its leases
soon. What ends here (a request has ended, or is given back) is told to Redis by the same thread, again and again until
it confirms. So callers never wait for Redis.

    hold ──▶ renewed every few seconds ──▶ drop | give_back | refuse, until Redis confirms it
                    │
                    ├─ Redis does not know the message (it has lost its data): adopted again, from its record
                    └─ it is another's, or was given back: `on_lost`, once

All that is sent may arrive twice. What was dropped is not there to be dropped, and only the holder gives a message back,
who is then no longer its holder.
"""

from __future__ import annotations

import functools
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from tasks.logs import get_logger
from tasks.metrics import worker as metrics
from tasks.queueing.keys import QueueKeys
from tasks.queueing.scripts import Argument, Scripts

logger = get_logger(__name__)
_LONGEST_RENEWAL_S = 2.0
_RENEWALS_PER_LEASE = 3
#: One, and more for those that have to find Redis again.
_RENEWALS_OF_ALL = 5
_RETRY_S = 0.3
_AT_ONCE = 500
#: What renew.lua answers of a message.
_RENEWED, _ANOTHERS, _UNKNOWN = 1, 0, -1


def process_holder() -> str:
    """Return the random name under which this process holds leases."""
    return _holder_of(os.getpid())


@functools.cache
def _holder_of(_pid: int) -> str:
    # A fork is another process, and must not go on under its parent's name.
    return secrets.token_hex(8)


def renewal_s(lease_s: float) -> float:
    """Return how often leases of `lease_s` are renewed, both in seconds."""
    return min(lease_s / _RENEWALS_PER_LEASE, _LONGEST_RENEWAL_S)


def grace_s(lease_s: float) -> float:
    """Return in what time, once Redis is back, all processes that live have renewed their leases of `lease_s`."""
    return min(lease_s, _RENEWALS_OF_ALL * renewal_s(lease_s))


@dataclass(frozen=True, slots=True, eq=False)
class _Ending:
    """What Redis must be told of a message that is not held any more: a script, and its arguments after the tag."""

    script: str
    arguments: tuple[Argument, ...] = ()


class Leases:
    """The leases of one process, kept by a thread of its own. All methods may be called from any thread.

    `connect` makes the thread's client. `on_lost` is called by the thread with the tag of a message that another process
    has now: what runs of it here is for nobody.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        keys: QueueKeys,
        holder: str,
        lease_s: float,
        on_lost: Callable[[str], None],
    ) -> None:
        self._connect = connect
        self._keys = keys
        self._holder = holder
        self._every_s = renewal_s(lease_s)
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._held: dict[str, bytes] = {}
        self._endings: dict[str, _Ending] = {}
        self._closing = False
        self._confirmed_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._confirmed_at = time.monotonic()
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop renewing. Waits up to `timeout_s` until Redis has confirmed what ended; what is held stays leased."""
        with self._changed:
            self._changed.wait_for(lambda: not self._endings, timeout_s if self._thread.is_alive() else 0)
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def hold(self, tag: str, record: bytes) -> None:
        """Renew the lease of a message from now on; `record` is what the queue delivered of it (`properties.record_of`)."""
        with self._changed:
            self._held[tag] = record
            # It was delivered again, so what was said of its last delivery has been heard, or is no longer true.
            self._endings.pop(tag, None)

    def drop(self, tag: str) -> None:
        """Forget a message: its request has ended."""
        self._end(tag, lambda _record: _Ending("drop"))

    def give_back(self, tag: str, delay_s: float = 0.0) -> None:
        """Give a message back to the queue; nobody gets it before `delay_s` seconds are over."""
        self._end(tag, lambda record: _Ending("give_back", (delay_s, record)))

    def refuse(self, tag: str, why: str) -> None:
        """Set a message aside that cannot be read. `why` says so in a few words, without its content."""
        metrics.REFUSED.inc()
        self._end(tag, lambda _record: _Ending("refuse", (why,)))

    def release(self, tag: str) -> None:
        """Stop renewing a message, and leave it to whoever has it now, or to the end of its lease."""
        with self._changed:
            self._held.pop(tag, None)
            self._endings.pop(tag, None)

    @property
    def renewal_age_s(self) -> float:
        """Return since when Redis has confirmed no renewal, in seconds; before the start 0.

        Having nothing to renew counts as confirmed.
        """
        return 0.0 if self._confirmed_at is None else time.monotonic() - self._confirmed_at

    @property
    def held(self) -> frozenset[str]:
        """Return the tags of what is held."""
        with self._changed:
            return frozenset(self._held)

    def _end(self, tag: str, ending: Callable[[bytes], _Ending]) -> None:
        with self._changed:
            self._endings[tag] = ending(self._held.pop(tag, b""))
            self._changed.notify_all()

    def _run(self) -> None:
        client = self._connect()
        scripts = Scripts(client, self._keys)
        due = time.monotonic() + self._every_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._endings or self._closing, max(0.0, due - time.monotonic()))
                if self._closing:
                    break
                endings = dict(self._endings)
            try:
                if time.monotonic() >= due:
                    # Counted from when this one is sent, not from when it is answered.
                    due = time.monotonic() + self._every_s
                    self._renew(scripts)
                self._tell(scripts, endings)
            except redis.RedisError as error:
                logger.warning("redis does not take the leases", error=type(error).__name__)
            except Exception:
                # Without this thread all that runs here would be run again elsewhere.
                logger.exception("the leases could not be kept")
            else:
                continue
            due = min(due, time.monotonic() + _RETRY_S)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, _RETRY_S)
        client.close()

    def _tell(self, scripts: Scripts, endings: dict[str, _Ending]) -> None:
        drops = [tag for tag, ending in endings.items() if ending.script == "drop"]
        for start in range(0, len(drops), _AT_ONCE):
            some = drops[start : start + _AT_ONCE]
            scripts.run("drop", *some)
            self._confirmed({tag: endings[tag] for tag in some})
        refusals = []
        for tag, ending in endings.items():
            if ending.script == "drop":
                continue
            try:
                if not scripts.run(ending.script, self._holder, tag, *ending.arguments):
                    logger.info("a lease was not for this process to end", tag=tag, script=ending.script)
                self._confirmed({tag: ending})
            except redis.ResponseError as refusal:
                # Redis is there, and what it makes of one message must not hold up the others.
                refusals.append(refusal)
        if refusals:
            raise refusals[0]

    def _confirmed(self, endings: dict[str, _Ending]) -> None:
        with self._changed:
            for tag, ending in endings.items():
                if self._endings.get(tag) is ending:
                    del self._endings[tag]
            self._changed.notify_all()

    def _renew(self, scripts: Scripts) -> None:
        with self._changed:
            held = list(self._held.items())
        for start in range(0, len(held), _AT_ONCE):
            some = held[start : start + _AT_ONCE]
            answers = scripts.run("renew", self._holder, *(tag for tag, _record in some))
            metrics.LEASES_RENEWED.inc(answers.count(_RENEWED))
            for (tag, record), answer in zip(some, answers, strict=True):
                if answer == _ANOTHERS:
                    self._lost(tag, record)
                elif answer == _UNKNOWN:
                    self._adopt(scripts, tag, record)
        self._confirmed_at = time.monotonic()

    def _adopt(self, scripts: Scripts, tag: str, record: bytes) -> None:
        with self._changed:
            if self._held.get(tag) is not record:
                return
        scripts.run("adopt", self._holder, tag, record)
        metrics.LEASES_ADOPTED.inc()
        logger.warning("redis had lost a message, and has it again", tag=tag)

    def _lost(self, tag: str, record: bytes) -> None:
        with self._changed:
            if self._held.get(tag) is not record:
                return
            del self._held[tag]
        metrics.LEASES_LOST.inc()
        logger.warning("a lease has gone to another process", tag=tag)
        try:
            self._on_lost(tag)
        except Exception:
            # The other leases must be renewed whatever becomes of this one.
            logger.exception("the loss of a lease could not be told", tag=tag)
