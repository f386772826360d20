"""Redis as a deployment runs it, to be killed, emptied and replaced."""

from __future__ import annotations

import shutil
from typing import Literal

from tests.services import RedisServer

Fsync = Literal["always", "everysec"]


class DurableRedis(RedisServer):
    """A Redis that writes its log to disk at each command (`always`) or each second (`everysec`)."""

    def __init__(self, fsync: Fsync) -> None:
        super().__init__()
        self.fsync = fsync

    def command(self) -> list[str]:
        """Return the command that runs Redis."""
        words = super().command()
        words[words.index("--appendfsync") + 1] = self.fsync
        return words

    def replace(self) -> None:
        """Kill it and start another, empty one in its place, as a failover to a replica that had nothing yet."""
        self.kill()
        for path in self.folder.iterdir():
            if path.name.startswith(("appendonly", "dump")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.start()
