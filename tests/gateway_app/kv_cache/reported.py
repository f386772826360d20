"""A fleet of workers that only report, through the queue's own script, and profiles for them to hold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import redis
from flask.testing import FlaskClient

from tasks import cache_hits
from tasks.cache_hits import Hits
from tasks.queueing.keys import QueueKeys
from tasks.queueing.pull import Held, Report
from tasks.queueing.scripts import Scripts
from tasks.settings import settings

HOUSE = "You work for the house, and answer in whole sentences. " * 12
FACTS: dict[str, Any] = {
    "state": "ready",
    "model": "tiny",
    "capacity_tokens": 8192,
    "free_tokens": 1000,
    "known_tokens": 700,
    "running": 3,
    "load": 4321,
    "prefill_rate": 25_000.0,
    "ram_rate": 0.0,
    "disk_rate": 0.0,
    "queried_tokens": 200,
    "hit_tokens": 150,
}


class Reporters:
    """Workers that report what a test says."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)
        self.keys = QueueKeys(settings().gateway.key_prefix)
        self._scripts = Scripts(self.client, self.keys)

    def report(self, worker: str, cache: Mapping[str, Held], **facts: Any) -> None:
        """Have a worker say all that it holds."""
        full = Report(worker, "epoch", 1, full=True, cache=cache, facts={**FACTS, **facts})
        assert self._scripts.run("report", full.to_json()) == 1

    def count(self, counted: Mapping[str, Hits], ago_s: float = 0.0) -> None:
        """Add to the counts of hits, some seconds ago."""
        keys, arguments = cache_hits.added(self.keys.prefix, counted, time.time() - ago_s)
        self.client.register_script(cache_hits.ADD)(keys, arguments)


def make(
    client: FlaskClient, agent: str, role: str | None, headers: Mapping[str, str] | None = None, **more: Any
) -> None:
    """Make an agent of the house's base, and of a role, that requests get at once."""
    parts = [{"kind": "agent_base_profile", "text": more.pop("text", HOUSE)}]
    parts += [{"kind": "role", "text": role}] if role else []
    made = client.post(
        "/v1/profiles", json={"agent": agent, "segments": parts, "activate": True, **more}, headers=dict(headers or {})
    )
    assert made.status_code == 201, made.text


def shown(client: FlaskClient, query: str = "", headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return what `/v1/cache` shows."""
    answer = client.get(f"/v1/cache{query}", headers=dict(headers or {}))
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.get_json()
    return page


def named(page: Mapping[str, Any], agent: str) -> dict[str, Any]:
    """Return the entry of an agent's profile."""
    (found,) = [entry for entry in page["data"] if entry.get("agent") == agent]
    return dict(found)
