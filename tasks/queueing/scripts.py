"""Calling the queue's scripts: each is one step that happens wholly or not at all."""

from __future__ import annotations

import hashlib
from typing import Any

import redis

from tasks.queueing.keys import QueueKeys, script
from tasks.queueing.pull import Strategy
from tasks.queueing.together import Together

Argument = str | bytes | int | float


class Scripts:
    """The scripts over one client. They are loaded again by themselves where Redis has forgotten them."""

    def __init__(
        self, client: redis.Redis | Together, keys: QueueKeys, strategy: Strategy = "cache_aware_continuous"
    ) -> None:
        self._client = client
        self._keys = keys.of_scripts
        self._root = keys.root
        self._strategy: Strategy = strategy
        self._known: dict[str, tuple[str, str]] = {}

    def run(self, name: str, *arguments: Argument) -> Any:
        """Return what script `name` answers. Raises redis.RedisError; whether it was done is then not known."""
        if name not in self._known:
            text = script(name, self._strategy)
            self._known[name] = text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        text, digest = self._known[name]
        given = (len(self._keys), *self._keys, self._root, *arguments)
        try:
            return self._client.execute_command("EVALSHA", digest, *given)
        except redis.exceptions.NoScriptError:
            # It was not run, and is known from now on.
            return self._client.execute_command("EVAL", text, *given)
