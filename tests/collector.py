"""A receiver of traces, as an OpenTelemetry collector is one: OTLP over HTTP, in protobuf."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1 import trace_pb2

T = TypeVar("T")
WAIT_S = 60.0
SOON = {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_TRACES_EXPORTER": "otlp"}


@dataclass(frozen=True)
class Received:
    """One span. `parent` is a span id, empty for none; times are in nanoseconds since the Unix epoch."""

    service: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    events: dict[str, int]
    links: list[str]
    failed: bool
    began: int
    ended: int


@dataclass
class Collector:
    """What was received, in order, and the bodies it came in. `refusing` has it answer 503."""

    url: str
    spans: list[Received] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    refusing: bool = False
    news: threading.Condition = field(default_factory=threading.Condition)

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that have a process send its spans here, soon."""
        return {**SOON, "OTEL_EXPORTER_OTLP_ENDPOINT": self.url}

    def of(self, trace: str) -> list[Received]:
        """Return the spans of a trace."""
        return [span for span in self.spans if span.trace == trace]

    def wait(self, what: Callable[[list[Received]], T], trace: str | None = None) -> T:
        """Return the first true value of `what`, which is asked about all spans, or those of one trace."""
        until = time.monotonic() + WAIT_S
        with self.news:
            while True:
                spans = self.spans if trace is None else self.of(trace)
                if found := what(spans):
                    return found
                left_s = until - time.monotonic()
                assert left_s > 0, sorted((span.service, span.name) for span in spans)
                self.news.wait(left_s)

    def take(self, body: bytes) -> None:
        """Take what an exporter sent."""
        with self.news:
            self.bodies.append(body)
            self.spans += _read(ExportTraceServiceRequest.FromString(body))
            self.news.notify_all()


@contextmanager
def collecting() -> Iterator[Collector]:
    """Return a collector on a free port."""
    collector = Collector("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = 503 if collector.refusing else 200 if self.path == "/v1/traces" else 404
            if status == 200:
                collector.take(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _read(request: ExportTraceServiceRequest) -> Iterator[Received]:
    for resource in request.resource_spans:
        service = _attributes(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield _received(service, span)


def _received(service: str, span: trace_pb2.Span) -> Received:
    return Received(
        service=service,
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        attributes=_attributes(span.attributes),
        events={event.name: event.time_unix_nano for event in span.events},
        links=[link.trace_id.hex() for link in span.links],
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        began=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, str(kind))
