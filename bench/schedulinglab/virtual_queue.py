"""The queue's own scripts in a real Redis, at a time that the bench sets.

What runs is the production text, but for the one line of common.lua that reads the clock: it reads a key instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import redis

from bench.schedulinglab.workload import Ask
from tasks.queueing.keys import QueueKeys, script
from tasks.queueing.pull import Report, Strategy, Wish, chain_text

CLOCK = "bench:clock"
_READS_TIME = "redis.call('TIME')"
_READS_KEY = f"cjson.decode(redis.call('GET', '{CLOCK}'))"
#: Virtual time begins at this instant: the queue's turns are times since 1970.
EPOCH_S = 1_800_000_000
#: Which of the workers' lists hold a marker.
_MARKED = "local m = {} for i, k in ipairs(KEYS) do m[i] = redis.call('LLEN', k) end return m"


class VirtualQueue:
    """One queue in an empty Redis, and the workers that may be woken. `now` is the virtual time in seconds."""

    def __init__(self, client: redis.Redis, strategy: Strategy, workers: Sequence[str]) -> None:
        self.now = 0.0
        self.calls = 0
        #: Which of the workers have a marker, as of the last call; the last one says whether anybody was to wake.
        self.marked: list[bool] = [False] * (len(workers) + 1)
        self._client = client
        self._strategy: Strategy = strategy
        self._keys = QueueKeys("bench:")
        self._wakes = [*(self._keys.wake_of(worker) for worker in workers), self._keys.wake]
        self._loaded: dict[str, str] = {}
        self._marked = client.script_load(_MARKED)
        client.flushdb()

    def put(self, ask: Ask, tag: str) -> None:
        """Publish a request."""
        profile = ask.profile
        facts = (profile.name, tag, ask.organization, ask.tokens, 0, b"", profile.tokens, chain_text(profile.chain))
        self.run("put", *facts)

    def reserve(self, worker: str, wish: Wish) -> tuple[list[str], float | None, dict[str, Any], bool]:
        """Return the tags of what a worker is given, when it should look again, why, and whether more is left."""
        taken, next_s, decision, left = self.run("reserve", worker, wish.to_json())
        tags = [tag.decode() for tag, *_ in taken]
        return tags, float(next_s) if next_s else None, json.loads(decision or "{}"), bool(left)

    def report(self, report: Report) -> bool:
        """Say what a worker's cache holds; return whether a full report is wanted instead."""
        return not self.run("report", report.to_json())

    def take_marker(self, worker: int) -> None:
        """Do as a worker whose blocking read is answered by its marker, or by the one that is for anybody."""
        index = worker if self.marked[worker] else -1
        self._client.lpop(self._wakes[index])
        self.marked[index] = False

    def run(self, name: str, *arguments: str | bytes | float) -> Any:
        """Run a script now; return what it answers."""
        if name not in self._loaded:
            text = script(name, self._strategy)
            if text.count(_READS_TIME) != 1:
                raise RuntimeError(f"the script {name} does not read its clock in one line")
            self._loaded[name] = self._client.script_load(text.replace(_READS_TIME, _READS_KEY))
        self.calls += 1
        keys = self._keys.of_scripts
        micros = round(self.now * 1e6)
        with self._client.pipeline(transaction=False) as pipe:
            pipe.set(CLOCK, f"[{EPOCH_S + micros // 1_000_000},{micros % 1_000_000}]")
            pipe.evalsha(self._loaded[name], len(keys), *keys, self._keys.root, *arguments)
            pipe.evalsha(self._marked, len(self._wakes), *self._wakes)
            _, answer, marked = pipe.execute()
        self.marked = [bool(count) for count in marked]
        return answer
