"""The sizing page's arithmetic, and the benchmark it rests on, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.overheadlab import planning
from tests.workers import ROOT

FIGURES = {
    **{f"cpu_ms_request {part}": 2.0 for part in ("gateway", "worker", "redis", "postgresql")},
    **{f"cpu_ms_token {part}": 0.1 for part in ("gateway", "worker", "redis", "postgresql")},
    **{
        f"bytes_request {store}": 1000.0 for store in ("redis_aof", "redis_network", "database", "database_log", "logs")
    },
    **{f"bytes_long_request {store}": 1400.0 for store in ("redis_aof", "redis_network", "database", "database_log")},
    "bytes_request redis_memory": 5000.0,
    "bytes_long_request redis_memory": 4990.0,
    "bytes_long_request logs": 1000.0,
}


def test_a_plan_multiplies_what_was_measured() -> None:
    """A request of 200 tokens costs 2 ms and 200 times 0.1; ten bytes a token come on top of those that every request has."""
    needed = planning.plan(FIGURES, 100.0, long_tokens=41)
    # 2.2 cores, of which each process is to fill 0.6.
    assert needed["gateway processes"] == 4
    assert needed["cores of Redis"] == pytest.approx(2.2)
    assert needed["Redis log, MB/s"] == pytest.approx(100 * (1000 + 10 * 199) / 1e6)
    # An hour of streams; a longer answer that took less is a measuring error, and nothing is deducted for it.
    assert needed["Redis memory for streams, GB"] == pytest.approx(100 * 3600 * 5000 / 1e9)
    assert needed["logs, GB a day"] == pytest.approx(100 * 86_400 * 1000 / 1e9)
    assert needed["PostgreSQL connections, at most"] == 9 * (4 + 4 + 2)


def test_plans_are_told_side_by_side() -> None:
    """Each rate has a column."""
    head, first, *_ = planning.table(FIGURES, (10.0, 1000.0), 41).splitlines()
    assert head.split() == ["requests/s", "10", "1,000"]
    assert first.split() == ["gateway", "processes", "1", "37"]


def test_sizing_in_small(tmp_path: Path) -> None:
    """It measures every process and store, and long answers cost more than short ones."""
    result = tmp_path / "result.json"
    options = ["--databases", "sqlite", "--requests", "40", "--streams", "16", "--waiting", "3", "--json", str(result)]
    command = [sys.executable, "-m", "bench.sizing", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.exists(), done.stdout + done.stderr
    figures = json.loads(result.read_text("utf-8"))["figures"]
    for name in ("cpu_ms_request gateway", "cpu_ms_token worker", "memory_mb gateway", "memory_mb redis"):
        assert figures[f"sqlite {name}"] > 0
    for store in ("redis_aof", "redis_network", "database"):
        assert figures[f"sqlite bytes_long_request {store}"] > figures[f"sqlite bytes_request {store}"] > 0
    assert "1,000" in done.stdout
    # A context of 4 KB waits in it.
    assert figures["sqlite bytes_waiting redis_memory"] > 4096
