"""Recording in one process: when it is on, what it says, and that it never holds anything up."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tasks import tracing
from tasks.errors import ConfigurationError, EngineFailed
from tasks.settings import TracingGroup
from tasks.tracing.context import CONTEXT_MAX, TRACESTATE_MAX, pack, unpack
from tasks.tracing.recorder import LINKS
from tests.collector import Collector, collecting
from tests.workers import ROOT

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Return a collector that this process's variables name."""
    with collecting() as made:
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        yield made


@contextmanager
def recording(flush_s: float = 3.0) -> Iterator[None]:
    """Record within."""
    stop = tracing.start(TracingGroup(enabled=True, flush_s=flush_s), "test")
    try:
        yield
    finally:
        stop()


@pytest.mark.parametrize(
    ("enabled", "variables", "exporters"),
    [
        (None, {}, ()),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ("otlp_proto_http",)),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, ("otlp_proto_http",)),
        (None, {"OTEL_TRACES_EXPORTER": "console, otlp"}, ("console", "otlp_proto_http")),
        (None, {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("otlp_proto_grpc",)),
        (None, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ()),
        (None, {"OTEL_SERVICE_NAME": "gateway"}, ()),
        (True, {}, ("otlp_proto_http",)),
        (True, {"OTEL_SDK_DISABLED": "true"}, ()),
        (False, {"OTEL_TRACES_EXPORTER": "otlp"}, ()),
    ],
)
def test_what_switches_it_on(
    monkeypatch: pytest.MonkeyPatch, enabled: bool | None, variables: dict[str, str], exporters: tuple[str, ...]
) -> None:
    """OpenTelemetry's own variables do, or the setting, and either switches it off."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert TracingGroup(enabled=enabled).exporters == exporters


def test_off_is_one_object_that_does_nothing() -> None:
    """Whatever is told of a step while nothing is recorded is the same object, and not current."""
    assert tracing.start(TracingGroup(), "test")() is None
    with tracing.begin("root", "server") as root, tracing.span("step") as step:
        step.set({"a": 1})
        step.fail("code")
        step.link(PARENT)
        step.end()
        assert root is step is tracing.current()
    assert (root.context, root.trace_id, tracing.current_trace_id(), tracing.is_on()) == (None, None, None, False)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, or with an exporter that is not installed, the start ends with what to do."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ConfigurationError, match="no exporter zipkin is installed"), recording():
        pass
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from tasks import tracing; from tasks.errors import ConfigurationError; from tasks.settings import TracingGroup\n"
        "try: tracing.start(TracingGroup(enabled=True), 'test')\n"
        "except ConfigurationError as error: print(error.detail)"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install -e '.[tracing]'" in said.stdout


def test_steps_below_steps(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """A span is below the current one; another task's or thread's is not; an error is noted by its code alone."""
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named")

    async def engine(number: int) -> None:
        with tracing.span(f"engine {number}"):
            await asyncio.sleep(0.01)
            raise EngineFailed("says the prompt")

    async def attempt(number: int) -> str | None:
        with tracing.begin(f"attempt {number}", "consumer", PARENT):
            await asyncio.sleep(0.01)
            with pytest.raises(EngineFailed):
                await engine(number)
            return tracing.current_trace_id()

    async def attempts() -> list[str | None]:
        return await asyncio.gather(*map(attempt, range(8)))

    with recording():
        assert set(asyncio.run(attempts())) == {PARENT.split("-")[1]}
        assert tracing.current() is tracing.UNRECORDED
    spans = {span.name: span for span in collector.spans}
    for number in range(8):
        assert spans[f"attempt {number}"].parent == PARENT.split("-")[2]
        below = spans[f"engine {number}"]
        assert below.parent == spans[f"attempt {number}"].id
        assert (below.failed, below.attributes) == (True, {"error.type": "engine_failed"})
    assert {span.service for span in collector.spans} == {"named"}
    assert not any(b"says the prompt" in body for body in collector.bodies)


@pytest.mark.parametrize(
    "context",
    [
        "",
        "nonsense",
        PARENT.upper(),
        PARENT.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        PARENT.replace("b7ad6b7169203331", "0" * 16),
        PARENT.replace("00-", "ff-", 1),
        "é" * 55,
    ],
)
def test_a_context_that_is_none(collector: Collector, context: str) -> None:
    """It is ignored: the trace begins here."""
    with recording():
        tracing.begin("root", "server", pack(context, "a=b")).end()
    (span,) = collector.spans
    assert span.parent == ""


def test_a_context_as_text() -> None:
    """It holds both fields, the second only if it is not too long, and says the same when it is read."""
    assert pack(None, "a=b") is None
    assert unpack(pack(PARENT, None) or "") == {"traceparent": PARENT}
    assert unpack(pack(PARENT, "a=b c,d=e") or "") == {"traceparent": PARENT, "tracestate": "a=b c,d=e"}
    longest = pack(PARENT, "a" * TRACESTATE_MAX)
    assert longest is not None
    assert len(longest) == CONTEXT_MAX
    assert pack(PARENT, "a" * (TRACESTATE_MAX + 1)) == PARENT


def test_a_tracestate_is_passed_on_and_never_logged(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    """Good ones travel, bad ones are left out without a word of them."""
    with recording(), caplog.at_level(logging.DEBUG):
        good = tracing.begin("root", "server", f"{PARENT} vendor=x")
        with good, tracing.span("step") as step:
            assert unpack(step.context or "")["tracestate"] == "vendor=x"
        for bad in ("sëcret", "a=b,=secret", "secret", "secret=" + "x" * 300):
            with tracing.begin("root", "server", f"{PARENT} {bad}") as span:
                assert "tracestate" not in unpack(span.context or "")
    assert "secret" not in caplog.text
    assert len(collector.spans) == 6


def test_what_is_not_sampled(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not recorded, and whoever continues it hears that."""
    with recording(), tracing.begin("root", "server", PARENT[:-1] + "0") as root, tracing.span("step") as step:
        assert (root.recording, step.recording) == (False, False)
        assert str(tracing.current().context).endswith("-00")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with recording():
        tracing.begin("root", "server").end()
        tracing.begin("continued", "server", PARENT).end()
    assert [span.name for span in collector.spans] == ["continued"]


def test_links(collector: Collector) -> None:
    """A span points once at each other trace, and never at its own or at what is none."""
    other = PARENT.replace("0af7", "ffff")
    with recording(), tracing.begin("root", "server", PARENT) as root:
        for context in (other, other, PARENT, root.context, None, "nonsense"):
            root.link(context)
        for number in range(2 * LINKS):
            root.link(f"00-{number + 1:032x}-b7ad6b7169203331-01")
    links = collector.spans[0].links
    assert (links[0], len(links), len(set(links))) == (other.split("-")[1], LINKS, LINKS)


def test_spans_of_many_threads(collector: Collector) -> None:
    """None is lost, and each is below its own thread's."""

    def work(number: int) -> None:
        for _ in range(20):
            with tracing.begin(f"root {number}", "server"), tracing.span(f"step {number}"):
                pass

    with recording():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    roots = {span.id: span.name for span in collector.spans if span.name.startswith("root")}
    steps = [span for span in collector.spans if span.name.startswith("step")]
    assert len(roots) == len(steps) == 160
    assert all(roots[step.parent].split()[1] == step.name.split()[1] for step in steps)


def test_no_other_variables_leak_in() -> None:
    """The developer's own collector gets nothing of the tests'."""
    assert not [name for name in os.environ if name.startswith("OTEL_")]
