"""The names of the queue's keys in Redis, and the scripts that change them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: The Celery queue GPU workers consume, and the topic exchange it is bound to with `gpu.#`.
FAMILY = "gpu"
TASK_NAME = "metaqore.generate"
_SCRIPTS = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """Keys below one prefix.

    `ready` is a sorted set of the profile hashes whose lists hold messages, by the time their oldest was published;
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
    def workers(self) -> str:
        """Return the set of the names of workers that may be alive."""
        return f"{self.prefix}workers"

    def heartbeat(self, worker: str) -> str:
        """Return the key in which a worker says that it lives."""
        return f"{self.prefix}worker:{worker}"


def script(name: str) -> str:
    """Return the source of one of the Lua scripts beside this module."""
    return (_SCRIPTS / f"{name}.lua").read_text("utf-8")
