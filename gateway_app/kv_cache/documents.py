"""The fleet's cache as JSON: for an organization, with nothing in it that others' work could change, and for operators."""

from __future__ import annotations

from typing import Any

from gateway_app.kv_cache.fleet import Worker
from gateway_app.kv_cache.tree import Entry, tier
from gateway_app.kv_cache.view import Seen

_TOKENS = ("gpu_tokens", "ram_tokens", "disk_tokens")


def of_organization(seen: Seen, following: str | None) -> dict[str, Any]:
    """Return what an organization is shown. Of workers that is what they are, and nothing of what they do.

    `following` is where the next page begins, if there is one.
    """
    workers = [
        {"worker": worker.name, "model": worker.facts.model, "capacity_tokens": worker.facts.capacity_tokens}
        for worker in seen.workers
    ]
    data = [_entry(entry, seen.now) for entry in seen.entries]
    return {"data": data, "workers": workers, "has_more": following is not None, "next": following}


def of_fleet(seen: Seen) -> dict[str, Any]:
    """Return all there was to see."""
    data = [{"organization": entry.organization, **_entry(entry, seen.now)} for entry in seen.entries]
    return {"data": data, "workers": [_worker(worker) for worker in seen.workers], "has_more": seen.cut}


def _worker(worker: Worker) -> dict[str, Any]:
    facts = worker.facts
    return {"worker": worker.name, **facts.model_dump(), "hit_rate": facts.hit_rate, "age_s": worker.age_s}


def _entry(entry: Entry, now: float) -> dict[str, Any]:
    hits = entry.hits
    shown: dict[str, Any] = {
        "type": "segment" if entry.stored is None else "profile",
        "link": entry.link,
        "parent": entry.parent,
        "depth": entry.depth,
        "kinds": list(entry.kinds),
        "tokens": entry.tokens,
        "profiles": entry.profiles,
        "requests": hits.requests,
        "hits": hits.hits,
        "hit_rate": hits.rate,
        "last_asked_s": max(0.0, now - hits.last) if hits.last else None,
        "copies": [
            {"worker": worker, "tier": tier(held, entry.tokens), **dict(zip(_TOKENS, held, strict=True))}
            for worker, held in sorted(entry.copies.items())
        ],
    }
    if entry.stored is not None:
        shown |= {"agent": entry.stored.agent, "version": entry.stored.version}
    return shown
