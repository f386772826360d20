"""Recording spans with OpenTelemetry's SDK: the only module that imports it.

Sampling, limits, batches, exporters and where they send to are the SDK's, and set by its own OTEL_ variables. Ended spans go
to a bounded queue that a thread of the SDK's empties: no request waits for a collector, and what does not fit is dropped.
The thread is begun with the recorder, and again in a process that is forked from one.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Sequence
from contextvars import Token
from importlib.metadata import entry_points
from typing import Self

from tasks.errors import ConfigurationError, GatewayError
from tasks.tracing import CURRENT, UNRECORDED, Attributes, Kind, Span
from tasks.tracing.context import pack, unpack

try:
    from opentelemetry import trace
    from opentelemetry.context.context import Context
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as missing:
    raise ConfigurationError(
        f"traces are to be recorded, and {missing.name} is not installed: pip install -e '.[tracing]', or set"
        " OTEL_TRACES_EXPORTER=none"
    ) from None

_KINDS = {
    "internal": SpanKind.INTERNAL,
    "server": SpanKind.SERVER,
    "producer": SpanKind.PRODUCER,
    "consumer": SpanKind.CONSUMER,
}
#: Traces that a span points at, at most: a socket may watch any number of requests for days.
LINKS = 128
_W3C = TraceContextTextMapPropagator()
# The one quotes what it cannot read of a tracestate, which is a client's text. The other tells of every try to reach a
# collector that is away, where it is enough to hear that spans were dropped.
for _name in ("opentelemetry.trace.span", "opentelemetry.exporter"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class RecordedSpan(Span):
    """A span of OpenTelemetry's, which may be left out by its sampler: it is passed on then, and not recorded."""

    __slots__ = ("_linked", "_span", "_token", "_tracer", "recording")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self.recording = span.is_recording()
        self._tracer = tracer
        self._span = span
        self._linked = {span.get_span_context().trace_id}
        self._token: Token[Span] | None = None

    @property
    def context(self) -> str | None:  # type: ignore[override]
        """Return what another process continues the trace from."""
        made = self._span.get_span_context()
        state = made.trace_state.to_header() if made.trace_state else None
        return pack(f"00-{made.trace_id:032x}-{made.span_id:016x}-{made.trace_flags:02x}", state)

    @property
    def trace_id(self) -> str:  # type: ignore[override]
        """Return the trace's id."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def child(self, name: str, attributes: Attributes | None, kind: Kind) -> Span:
        """Begin a span below this one. Below one that is not recorded, none is."""
        if not self.recording:
            return UNRECORDED
        parent = trace.set_span_in_context(self._span)
        return RecordedSpan(self._tracer, self._tracer.start_span(name, parent, _KINDS[kind], attributes))

    def __enter__(self) -> Self:
        """Make it the current span."""
        self._token = CURRENT.set(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """End it, with the code or the type of an error that leaves it."""
        if self._token is not None:
            CURRENT.reset(self._token)
        # Being cancelled is no failure, and what is no Exception is a way to end.
        if isinstance(error, GatewayError):
            self.fail(error.code)
        elif isinstance(error, Exception):
            self.fail(type(error).__name__)
        self.end()

    def set(self, attributes: Attributes) -> None:
        """Note what is now known of it."""
        self._span.set_attributes(attributes)

    def event(self, name: str, at: float | None = None) -> None:
        """Note that something happened."""
        self._span.add_event(name, timestamp=_nanoseconds(at))

    def link(self, context: str | None) -> None:
        """Point at a span of another trace, once a trace."""
        if context is None or not self.recording or len(self._linked) > LINKS:
            return
        target = trace.get_current_span(_W3C.extract(unpack(context))).get_span_context()
        if target.is_valid and target.trace_id not in self._linked:
            self._linked.add(target.trace_id)
            self._span.add_link(target)

    def fail(self, code: str) -> None:
        """Note that it failed, by a stable code."""
        self._span.set_attribute("error.type", code)
        self._span.set_status(Status(StatusCode.ERROR, code))

    def end(self) -> None:
        """End it, if it was not yet."""
        if self._span.is_recording():
            self._span.end()


class Recorder:
    """Makes this process's spans, and sends them. Raises ConfigurationError if an exporter is not there.

    `exporters` are names as OTEL_TRACES_EXPORTER has them, or of plug-ins of the group `opentelemetry_traces_exporter`.
    """

    def __init__(self, exporters: Sequence[str], service: str, flush_s: float) -> None:
        self._exporters = [_exporter(name) for name in exporters]
        self._flush_s = flush_s
        named = Resource({"service.name": service, "host.name": socket.gethostname()})
        resource = Resource.create().merge(named).merge(OTELResourceDetector().detect())
        # The end of the process is its wiring place's to tell, since it also bounds it.
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processors = [BatchSpanProcessor(exporter) for exporter in self._exporters]
        for processor in self._processors:
            provider.add_span_processor(processor)
        self._tracer = provider.get_tracer("metaqore")

    def begin(
        self, name: str, kind: Kind, context: str | None, attributes: Attributes | None, started_at: float | None
    ) -> Span:
        """Begin a span as `tasks.tracing.begin` says."""
        # Without one it is a context of nothing, lest what another library has made current become the parent.
        parent = Context() if context is None else _W3C.extract(unpack(context))
        started_ns = _nanoseconds(started_at)
        made = self._tracer.start_span(name, parent, _KINDS[kind], attributes, start_time=started_ns)
        return RecordedSpan(self._tracer, made)

    def close(self) -> None:
        """Send what there is, for so long as is allowed; the rest is dropped."""
        endings = [threading.Thread(target=each.shutdown, daemon=True) for each in self._processors]
        for ending in endings:
            ending.start()
        for ending, exporter in zip(endings, self._exporters, strict=True):
            ending.join(self._flush_s)
            if ending.is_alive():
                # It waits for a collector that does not answer.
                exporter.shutdown()


def _nanoseconds(at: float | None) -> int | None:
    return None if at is None else int(at * 1e9)


def _exporter(name: str) -> SpanExporter:
    """Return the exporter of this name, which reads its own variables. Raises ConfigurationError."""
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        try:
            exporter: SpanExporter = found.load()()
        except Exception as error:  # a plug-in may raise anything at what its variables say
            raise ConfigurationError(f"the trace exporter {name} cannot start: {error}") from None
        return exporter
    raise ConfigurationError(
        f"OTEL_TRACES_EXPORTER: no exporter {name} is installed; '.[tracing]' has otlp and console"
    )
