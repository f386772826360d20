"""What processes use, as the kernel counts it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil


def family(roots: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Return these processes that still run, with all their descendants."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        with suppress(psutil.NoSuchProcess):
            found |= {process.pid: process for process in (root, *root.children(recursive=True))}
    return list(found.values())


def cpu_s(parts: Mapping[str, Sequence[psutil.Process]]) -> dict[str, float]:
    """Return the processor seconds, user and system, that each part has used so far.

    A descendant that has ended counts with whoever waited for it, so that nothing is lost between two calls.
    """
    used = dict.fromkeys(parts, 0.0)
    for part, roots in parts.items():
        for process in family(roots):
            with suppress(psutil.NoSuchProcess):
                used[part] += sum(process.cpu_times()[:4])
    return used


def idle_cores(parts: Mapping[str, Sequence[psutil.Process]], seconds: float) -> float:
    """Return how many processors are used while nothing is asked."""
    before = sum(cpu_s(parts).values())
    time.sleep(seconds)
    return (sum(cpu_s(parts).values()) - before) / seconds


def memory_mb(roots: Sequence[psutil.Process]) -> float:
    """Return the memory of processes in megabytes; what several share is divided among them."""
    used = 0.0
    for process in family(roots):
        with suppress(psutil.NoSuchProcess):
            used += process.memory_full_info().pss / 1e6
    return used


def largest_rss_mb(roots: Sequence[psutil.Process]) -> float:
    """Return the resident memory, in megabytes, of the largest one of these and their descendants."""
    largest = 0.0
    for process in family(roots):
        with suppress(psutil.NoSuchProcess):
            largest = max(largest, process.memory_info().rss / 1e6)
    return largest
