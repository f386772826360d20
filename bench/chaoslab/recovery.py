"""How requests came back: which were run again, and how long that took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from bench.chaoslab.asking import Told
from bench.chaoslab.lab import quantile
from bench.chaoslab.record import Record


def run_again(record: Record) -> float:
    """Return which share of the requests began more than one attempt."""
    again = sum(len(record.starts(request_id)) > 1 for request_id in record.rows)
    return again / max(1, len(record.rows))


def recoveries_s(record: Record, kills: Mapping[str, Sequence[float]]) -> list[float]:
    """Return, for each attempt that a kill cut short, the seconds from the kill to the request's next attempt.

    `kills` has the moments at which each worker was killed, by the process's name.
    """
    found = []
    for request_id in record.rows:
        starts = record.starts(request_id)
        for first, second in pairwise(starts):
            between = [at for at in kills.get(first.worker or "", ()) if first.at <= at <= second.at]
            if between:
                found.append(second.at - between[0])
    return found


def figures(record: Record, kills: Mapping[str, Sequence[float]], lease_s: float) -> dict[str, float]:
    """Return the share that was run again, and the time to the next attempt, in leases."""
    recovered = recoveries_s(record, kills)
    return {
        "run_again_share": run_again(record),
        "recoveries": float(len(recovered)),
        "recovery_p50_leases": quantile(recovered, 0.5) / lease_s,
        "recovery_p99_leases": quantile(recovered, 0.99) / lease_s,
    }


def told_after_s(record: Record, told: Iterable[Told]) -> list[float]:
    """Return, for each client that was told of an end, the seconds that came between the end's record and its frame."""
    return [
        one.ended_at - record.events[one.request_id][-1].at
        for one in told
        if one.request_id is not None and one.ended_at is not None
    ]
