"""The fleet's cache as text, for a terminal: a table of workers, and one of each organization's profiles, as a tree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from gateway_app.kv_cache.fleet import Worker
from gateway_app.kv_cache.tree import Entry, tier
from gateway_app.kv_cache.view import Seen

_MINUTE_S, _HOUR_S = 60, 3600
_WORKERS = ("worker", "state", "capacity", "known", "free", "running", "in hand", "prefill/s", "hit rate", "heard of")
_ENTRIES = ("", "tokens", "held by", "hits", "of tokens", "last asked")


def lines(seen: Seen) -> Iterator[str]:
    """Return the lines. Numbers of a cache are tokens."""
    if seen.workers:
        yield from _table(_WORKERS, [_worker(worker) for worker in seen.workers])
    else:
        yield "no worker has reported in the last seconds"
    for organization, found in groupby(seen.entries, key=lambda entry: entry.organization):
        yield ""
        yield from _table((_safe(organization), *_ENTRIES[1:]), [_entry(entry, seen.now) for entry in found])
    if seen.cut:
        yield "and more: choose with --organization, --agent or --worker"


def _worker(worker: Worker) -> list[str]:
    facts = worker.facts
    tokens = (facts.capacity_tokens, facts.known_tokens, facts.free_tokens, facts.running, facts.load)
    numbers = [f"{number:,}" for number in (*tokens, round(facts.prefill_rate))]
    return [_safe(worker.name), _safe(facts.state), *numbers, _share(facts.hit_rate), f"{worker.age_s:.1f} s ago"]


def _entry(entry: Entry, now: float) -> list[str]:
    if entry.stored is None:
        name = f"{' + '.join(map(_safe, entry.kinds))}, shared by {entry.profiles}"
    else:
        name = f"{_safe(entry.stored.agent)} version {entry.stored.version}"
    held = []
    for worker, copy in sorted(entry.copies.items()):
        where: str = tier(copy, entry.tokens)
        held.append(f"{_safe(worker)} ({'/'.join(f'{part:,}' for part in copy) if where == 'part' else where})")
    hits = entry.hits
    counted = [f"{hits.hits} of {hits.requests}", _share(hits.rate), _ago(now - hits.last)] if hits.requests else []
    return ["  " * (entry.depth + 1) + name, f"{entry.tokens:,}", ", ".join(held) or "nobody", *counted]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Return lines with columns as wide as they must be; a row may end early."""
    all_rows = [header, *rows]
    widths = [max(len(row[at]) if at < len(row) else 0 for row in all_rows) for at in range(len(header))]
    for row in all_rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()


def _share(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < _MINUTE_S:
        return f"{seconds:.0f} s ago"
    return f"{seconds / _MINUTE_S:.0f} min ago" if seconds < _HOUR_S else f"{seconds / _HOUR_S:.1f} h ago"


def _safe(text: str) -> str:
    """Return text that says nothing to the terminal: callers chose some of the names."""
    return ascii(text)[1:-1]
