"""Spans are sent from beside: a collector that is away holds nothing up, and what there is at the end is sent."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from socket import create_server

import pytest

from tasks import tracing
from tasks.settings import TracingGroup
from tests.collector import Collector, collecting
from tests.services.helpers import free_port
from tests.workers import ROOT

QUICK_S = 2.0


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Return a collector that this process's variables name."""
    with collecting() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


def test_a_collector_that_is_away(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording takes no longer, what does not fit is dropped, and the end waits no longer than it may."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "512")
    for endpoint, refusing in ((f"http://127.0.0.1:{free_port()}", False), (collector.url, True)):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        collector.refusing = refusing
        stop = tracing.start(TracingGroup(enabled=True, flush_s=0.2), "test")
        began = time.process_time()
        for _ in range(2000):
            tracing.begin("root", "server").end()
        assert time.process_time() - began < QUICK_S
        began = time.monotonic()
        stop()
        assert time.monotonic() - began < QUICK_S
    assert collector.spans == []


def test_a_collector_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that accepts the connection and never answers holds up the end no longer either."""
    with create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        stop = tracing.start(TracingGroup(enabled=True, flush_s=0.2), "test")
        tracing.begin("root", "server").end()
        began = time.monotonic()
        stop()
        assert time.monotonic() - began < QUICK_S


def test_the_end_sends_what_there_is(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a process ends without closing anything, as Flask's own server does."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    program = (
        "from tasks import tracing; from tasks.settings import settings\n"
        "tracing.start(settings().tracing, 'test')\n"
        "tracing.begin('last', 'server').end()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    assert [span.name for span in collector.spans] == ["last"]


def test_a_process_that_is_forked(collector: Collector) -> None:
    """A child sends its own spans, though its parent has begun to record."""
    program = (
        "import os, threading; from tasks import tracing; from tasks.settings import settings\n"
        "stop = tracing.start(settings().tracing, 'test')\n"
        "tracing.begin('parent', 'server').end()\n"
        "child = os.fork()\n"
        "if not child: tracing.begin('child', 'server').end()\n"
        "stop()\n"
        "if child: os.waitpid(child, 0)\n"
        "else: os._exit(0)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, check=True)
    assert sorted(span.name for span in collector.spans) == ["child", "parent"]
