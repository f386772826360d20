"""`/healthz` beside the metrics: what orchestrators ask before they restart a worker or a housekeeper."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import pytest
import requests

from gateway_app.housekeeping import housekeeper
from gateway_app.housekeeping.housekeeper import Housekeeper
from tasks.metrics import serving
from tasks.metrics.making import told_by
from tasks.settings import PREFIX, settings
from tests.services import free_port
from worker_gpu import metrics as worker_metrics


def asked(port: int, path: str = "/healthz") -> tuple[int, str]:
    """Return the answer of a port."""
    answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=60)
    return answer.status_code, answer.text.strip()


def test_it_says_what_is_wrong() -> None:
    """And the metrics are told all the same."""
    problems: list[str | None] = [None, "the engine's loop does not turn"]
    port = free_port()
    end = serving.serve(told_by("worker"), "127.0.0.1", port, lambda: problems.pop(0))
    try:
        assert asked(port) == (200, "ok")
        assert asked(port) == (503, "the engine's loop does not turn")
        assert asked(port, "/metrics")[0] == 200
    finally:
        end()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Return a loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_worker_whose_loop_stands_still(loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is fine, then something blocks its loop, then its engine is dead."""
    monkeypatch.setattr(worker_metrics, "_LOOP_S", 0.2)
    heart = SimpleNamespace(state="ready")
    parts = cast("Any", SimpleNamespace(heart=heart, database=None, engine=None, leases=None))
    port = free_port()
    monkeypatch.setenv(f"{PREFIX}METRICS__WORKER_PORT", str(port))
    settings.cache_clear()
    monkeypatch.setattr(worker_metrics, "told_by", lambda *_: told_by("worker"))
    monkeypatch.setattr(worker_metrics, "Own", lambda *_: None)

    async def watch() -> Any:
        return worker_metrics.watch(parts, settings(), lambda: 0)

    with ExitStack() as stack:
        stack.callback(asyncio.run_coroutine_threadsafe(watch(), loop).result())
        assert asked(port) == (200, "ok")
        blocked = threading.Event()
        stack.callback(blocked.set)
        loop.call_soon_threadsafe(blocked.wait)
        assert asked(port) == (503, "the engine's loop has not turned for 0 s")
        blocked.set()
        assert asked(port) == (200, "ok")
        heart.state = "dead"
        assert asked(port)[0] == 503


def test_a_housekeeper_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that fail are rounds; none at all, for long, is what a restart mends."""
    clock = [100.0]
    monkeypatch.setattr(housekeeper, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    nothing = cast("Any", None)
    made = Housekeeper(nothing, nothing, nothing, nothing, nothing, nothing)
    assert made.wrong() is None
    clock[0] += housekeeper.STALLED_S + 1
    assert made.wrong() == "the housekeeper has done nothing for 121 s"
    closing = made._closing

    def fail() -> bool:
        closing.set()
        raise RuntimeError

    monkeypatch.setattr(made, "round", fail)
    made._run()
    assert made.wrong() is None
