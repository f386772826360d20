"""A fleet of workers that exist in their reports alone, and what is wished of it."""

from __future__ import annotations

import json
from typing import Any

import redis

from tasks.queueing.keys import QueueKeys
from tasks.queueing.pull import Held, Report, Wish
from tasks.queueing.scripts import Scripts

TOKENS = 6000


class Fleet:
    """Workers that exist in their reports alone, and wishes."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.keys = QueueKeys("metaqore:")
        self.scripts = Scripts(client, self.keys)
        self._numbers: dict[str, int] = {}

    def report(self, worker: str, **cache: int | Held) -> None:
        """Let a worker live, and hold so many tokens of profiles on the GPU, or on each tier; `a` is that of 64 letters a."""
        found = {name if len(name) == 64 else name * 64: of for name, of in cache.items()}
        held = {name: of if isinstance(of, tuple) else (of, of, of) for name, of in found.items()}
        number = self._numbers[worker] = self._numbers.get(worker, 0) + 1
        report = Report(worker, "epoch", number, full=number == 1, cache=held)
        assert self.scripts.run("report", report.to_json()) == 1
        # Until it dies, however slow the machine is that runs the test.
        self._seen(worker, 3600)

    def wish(self, profile: str, copies: int = 1, seconds: float = 0, tokens: int = TOKENS) -> list[Any]:
        """Wish for copies; return what is told."""
        answer = self.scripts.run("wish", profile, "acme", copies, seconds, tokens, "")
        return [each.decode() if isinstance(each, bytes) else each for each in answer]

    def ask(
        self,
        worker: str,
        keeps: int = 100_000,
        spared: tuple[str, ...] = (),
        given_up: tuple[str, ...] = (),
        **wish: Any,
    ) -> str | None:
        """Ask as a worker; return the profile that it shall compute."""
        wished = Wish(worker, **{"room": 8, "budget": 8192, **wish})
        found = self.scripts.run("warm", wished.to_json(), keeps, json.dumps(spared), json.dumps(given_up))
        return None if found is None else found.decode()

    def die(self, worker: str) -> None:
        """Let a worker have been silent for a minute."""
        self._seen(worker, -60)

    def _seen(self, worker: str, from_now_s: float) -> None:
        seconds, _ = self.client.time()
        self.client.zadd(self.keys.named("alive"), {worker: seconds + from_now_s})
