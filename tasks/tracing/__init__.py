"""What one request went through, from HTTP to the last frame, told as an OpenTelemetry trace.

Recording belongs to the process, as logging does, and not to any of its parts: a wiring place calls `start` once, and
whoever does a step of a request says so with `span`. The current span is a context variable. A thread serves one
HTTP request at a time, and a worker runs each of its requests as an asyncio task of its own, so a span that is begun
there is the parent of what is begun below it, and of nothing else. Between processes the context travels as text (`context`).

Off, which is the default, nothing of OpenTelemetry is imported, and each step costs a call that returns the same object.

Attributes are ids, counts and codes. Nothing of what clients and models say to each other may become one.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from tasks.settings import TracingGroup
    from tasks.tracing.recorder import Recorder

Attributes = Mapping[str, str | int | float | bool | Sequence[str]]
Kind = Literal["internal", "server", "producer", "consumer"]


class Span:
    """One step of a request; as it is here, one that is not recorded.

    Used as a context manager it is the current span within, and ends with it; an error that leaves it is noted by its
    stable code, or its type, never by its text.
    """

    __slots__ = ()
    #: Whether anything is kept of it, so that what is costly to tell need not be found out.
    recording = False
    #: What another process continues the trace from, and the id of the trace in hexadecimal.
    context: str | None = None
    trace_id: str | None = None

    def __enter__(self) -> Self:
        """Make it the current span."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """End it, and make the one before it current again."""

    def child(self, name: str, attributes: Attributes | None, kind: Kind) -> Span:  # noqa: ARG002  nothing is kept
        """Begin a span below this one. Below one that is not recorded, none is."""
        return self

    def set(self, attributes: Attributes) -> None:
        """Note what is now known of it."""

    def event(self, name: str, at: float | None = None) -> None:
        """Note that something happened, `at` seconds since the Unix epoch, if not just now."""

    def link(self, context: str | None) -> None:
        """Point at a span of another trace; at one of its own, or at None, it does nothing."""

    def fail(self, code: str) -> None:
        """Note that it failed, by a stable code."""

    def end(self) -> None:
        """End it. Once is enough, and more changes nothing."""


#: What every step is while nothing is recorded.
UNRECORDED = Span()
CURRENT: ContextVar[Span] = ContextVar("metaqore_span", default=UNRECORDED)
_recorder: Recorder | None = None


def start(settings: TracingGroup, service: str) -> Callable[[], None]:
    """Begin to record in this process, if the settings say so; return what ends it, within `settings.flush_s`.

    `service` is the process's name where OTEL_SERVICE_NAME gives none. Raises ConfigurationError if OpenTelemetry is not
    installed, or not with the exporter that is asked for.
    """
    global _recorder  # noqa: PLW0603  there is one a process, see above
    exporters = settings.exporters
    if not exporters:
        return lambda: None
    from tasks.tracing.recorder import Recorder

    recorder = _recorder = Recorder(exporters, service, settings.flush_s)

    def stop() -> None:
        global _recorder  # noqa: PLW0603
        if _recorder is recorder:
            _recorder = None
        atexit.unregister(stop)
        recorder.close()

    # For what ends without closing what it has, as Flask's own server does.
    atexit.register(stop)
    return stop


def is_on() -> bool:
    """Tell whether this process records."""
    return _recorder is not None


def begin(
    name: str,
    kind: Kind,
    context: str | None = None,
    attributes: Attributes | None = None,
    started_at: float | None = None,
) -> Span:
    """Begin a span that continues the trace of `context`, or without one a trace of its own.

    `started_at` is in seconds since the Unix epoch, if it was not now.
    """
    if _recorder is None:
        return UNRECORDED
    return _recorder.begin(name, kind, context, attributes, started_at)


def span(name: str, attributes: Attributes | None = None, kind: Kind = "internal") -> Span:
    """Begin a span below the current one. Where there is none, nothing is recorded."""
    return CURRENT.get().child(name, attributes, kind)


def current() -> Span:
    """Return the span that is current here."""
    return CURRENT.get()


def current_trace_id() -> str | None:
    """Return the id of the trace that is recorded here, 32 hexadecimal digits, or None: for log lines."""
    return CURRENT.get().trace_id
