"""The names of the queue's keys in Redis, and the scripts that change them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.job import Priority

#: The Celery queue GPU workers consume, and the topic exchange it is bound to with `gpu.#`.
FAMILY = "gpu"
TASK_NAME = "metaqore.generate"
#: How far ahead of its time a message's turn comes. It is bounded, so that waiting always wins in the end.
HEAD_START_S: dict[Priority, int] = {"high": 30, "normal": 0, "low": -60}
_SCRIPTS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """Keys below one prefix.

    Each profile has a list for each priority it is asked with. `ready` is a sorted set of the names of the lists that
    hold messages, by the turn of their first; `waiting` is the number of messages on all of them;
    `wake` is a list holding at most one marker, on which idle workers block; `leased` holds the messages that workers
    have, by delivery tag, and `leases` when each was taken or last renewed; `refused` is a list of the last hundred
    elements that were no messages. All times are Redis's own, in seconds.
    """

    prefix: str

    @property
    def lists(self) -> str:
        """Return what comes before a profile hash in the name of its list."""
        return f"{self.prefix}{FAMILY}:list:"

    @property
    def ready(self) -> str:
        """Return the sorted set of profile hashes with waiting messages."""
        return f"{self.prefix}{FAMILY}:ready"

    @property
    def wake(self) -> str:
        """Return the list that holds the wake marker."""
        return f"{self.prefix}{FAMILY}:wake"

    @property
    def leased(self) -> str:
        """Return the hash of messages that workers have."""
        return f"{self.prefix}{FAMILY}:leased"

    @property
    def leases(self) -> str:
        """Return the sorted set of their delivery tags by lease time."""
        return f"{self.prefix}{FAMILY}:leases"

    @property
    def refused(self) -> str:
        """Return the list of elements that were no messages."""
        return f"{self.prefix}{FAMILY}:refused"

    @property
    def waiting(self) -> str:
        """Return the counter of messages that wait."""
        return f"{self.prefix}{FAMILY}:waiting"

    @property
    def cancels(self) -> str:
        """Return the channel on which workers hear of requests to stop."""
        return f"{self.prefix}cancel"

    @property
    def workers(self) -> str:
        """Return the set of the names of workers that may be alive."""
        return f"{self.prefix}workers"

    def heartbeat(self, worker: str) -> str:
        """Return the key in which a worker says that it lives."""
        return f"{self.prefix}worker:{worker}"


def list_name(static_profile_hash: str, priority: Priority) -> str:
    """Return which list a message goes to."""
    return static_profile_hash if priority == "normal" else f"{static_profile_hash}:{priority}"


def script(name: str) -> str:
    """Return the source of one of the Lua scripts beside this module."""
    return (_SCRIPTS / f"{name}.lua").read_text("utf-8")
