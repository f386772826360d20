"""From what one request costs to what a deployment needs: the worked examples of docs/sizing.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tasks.settings import DatabaseGroup, StreamingGroup

#: Of a process's core, what is planned with: the rest is for peaks, and keeps waiting short.
FILLED = 0.6
ANSWER_TOKENS = 200
HOUSEKEEPERS = 2
DAY_S = 86_400


def plan(figures: Mapping[str, float], per_s: float, long_tokens: int) -> dict[str, float]:
    """Return what so many requests a second need, each with an answer of ANSWER_TOKENS.

    `figures` are of one database, as `bin/bench sizing` measures them, with long answers of `long_tokens`.
    """

    def cores(part: str) -> float:
        cost_ms = figures[f"cpu_ms_request {part}"] + ANSWER_TOKENS * figures[f"cpu_ms_token {part}"]
        return per_s * cost_ms / 1000

    def size(store: str) -> float:
        short, long = (figures[f"bytes_{kind} {store}"] for kind in ("request", "long_request"))
        return short + max(0.0, long - short) * (ANSWER_TOKENS - 1) / (long_tokens - 1)

    gateways, workers = (math.ceil(cores(part) / FILLED) for part in ("gateway", "worker"))
    needed = {
        "gateway processes": float(gateways),
        "worker processes, for the CPU's sake": float(workers),
        "cores of Redis": cores("redis"),
        "Redis memory for streams, GB": per_s * StreamingGroup().retention_s * size("redis_memory") / 1e9,
        "Redis log, MB/s": per_s * size("redis_aof") / 1e6,
        "Redis network, MB/s": per_s * size("redis_network") / 1e6,
        "database, GB a day": per_s * DAY_S * size("database") / 1e9,
        "database log, MB/s": per_s * size("database_log") / 1e6,
        "logs, GB a day": per_s * DAY_S * size("logs") / 1e9,
    }
    if "cpu_ms_request postgresql" in figures:
        connections = (DatabaseGroup().pool_size + 1) * (gateways + workers + HOUSEKEEPERS)
        needed |= {"cores of PostgreSQL": cores("postgresql"), "PostgreSQL connections, at most": float(connections)}
    return needed


def costs(measured: Mapping[str, Mapping[str, float]]) -> str:
    """Return what was measured, a column a database, in the units that people think in."""
    parts = ("gateway", "worker", "redis", "housekeeper", "postgresql")
    stores = ("redis_memory", "redis_aof", "redis_network", "database", "database_log", "logs")
    rows = [(f"CPU ms a request: {part}", f"cpu_ms_request {part}", 1.0, 2) for part in parts]
    rows += [(f"CPU ms a token: {part}", f"cpu_ms_token {part}", 1.0, 3) for part in parts]
    rows += [(f"requests/s a process: {part}", f"requests_per_s {part}", 1.0, 0) for part in parts[:2]]
    rows += [(f"tokens/s a process: {part}", f"tokens_per_s {part}", 1.0, 0) for part in parts[:2]]
    rows += [(f"memory MB: {part}", f"memory_mb {part}", 1.0, 0) for part in parts]
    # A byte a request is a megabyte a million.
    rows += [(f"GB a million requests: {store}", f"bytes_request {store}", 1e-3, 2) for store in stores]
    rows += [(f"the same, of 41 tokens: {store}", f"bytes_long_request {store}", 1e-3, 2) for store in stores]
    rows += [("KB of Redis a waiting request of 4 KB", "bytes_waiting redis_memory", 1e-3, 1)]
    rows += [(f"connections: {store}", f"connections {store}", 1.0, 0) for store in ("redis", "postgresql")]
    lines = [f"{'':<40}" + "".join(f"{database:>12}" for database in measured)]
    for label, figure, factor, digits in rows:
        found = (of.get(figure) for of in measured.values())
        cells = (f"{'-':>12}" if value is None else f"{value * factor:>12,.{digits}f}" for value in found)
        lines.append(f"{label:<40}{''.join(cells)}")
    return "\n".join(lines)


def table(figures: Mapping[str, float], rates: Sequence[float], long_tokens: int) -> str:
    """Return the plans for several rates, a column each."""
    plans = [plan(figures, rate, long_tokens) for rate in rates]
    head = f"{'requests/s':<40}" + "".join(f"{rate:>10,.0f}" for rate in rates)
    rows = (f"{name:<40}" + "".join(f"{of[name]:>10,.{_digits(of[name])}f}" for of in plans) for name in plans[0])
    return "\n".join((head, *rows))


def _digits(value: float) -> int:
    return 0 if value >= 100 or value.is_integer() else 2 if value < 10 else 1
