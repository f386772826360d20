"""Calling the queue's scripts: each is one step that happens wholly or not at all."""

from __future__ import annotations

from typing import Any

import redis
from redis.commands.core import Script

from tasks.queueing.keys import QueueKeys, script

Argument = str | bytes | int | float


class Scripts:
    """The scripts over one client. They are loaded again by themselves where Redis has forgotten them."""

    def __init__(self, client: redis.Redis, keys: QueueKeys) -> None:
        self._client = client
        self._keys = keys.of_scripts
        self._lists = keys.lists
        self._known: dict[str, Script] = {}

    def run(self, name: str, *arguments: Argument) -> Any:
        """Return what script `name` answers. Raises redis.RedisError; whether it was done is then not known."""
        if name not in self._known:
            self._known[name] = self._client.register_script(script(name))
        return self._known[name](keys=self._keys, args=[self._lists, *arguments])
