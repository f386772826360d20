"""The chain that every line goes through, whoever logged it, and its two forms: JSON, and text for a person."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, Literal

from structlog.dev import ConsoleRenderer
from structlog.processors import TimeStamper
from structlog.stdlib import ProcessorFormatter, add_log_level, add_logger_name

from tasks.logs import redaction
from tasks.logs.context import bound_request
from tasks.logs.redaction import Event
from tasks.tracing import current_trace_id

Form = Literal["json", "console"]
_FIRST = ("timestamp", "level", "logger", "event", "request_id", "trace_id")


class _Formatter(ProcessorFormatter):
    """structlog's, which says of a line that it cannot render no more than that."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        try:
            return super().format(record)
        except Exception as error:  # whatever it is: `logging` would print the record, and what is in it
            return json.dumps(
                {"level": "error", "event": "a line could not be rendered", "error": type(error).__name__}
            )


def make_formatter(form: Form, *, colors: bool = False) -> logging.Formatter:
    """Return what renders a record, of ours or of a library's."""
    renderer = [_json] if form == "json" else [_readable, ConsoleRenderer(colors=colors, pad_event_to=0)]
    return _Formatter(
        foreign_pre_chain=[redaction.foreign],
        processors=[
            TimeStamper(fmt="iso", utc=True),
            add_log_level,
            add_logger_name,
            _context,
            redaction.exceptions,
            ProcessorFormatter.remove_processors_meta,
            redaction.refuse_unknown,
            _ordered,
            *renderer,
        ],
        use_get_message=False,
        pass_foreign_args=True,
    )


def chosen(form: Literal["auto", "json", "console"]) -> Form:
    """Return the form to use: for "auto", text on a terminal and JSON elsewhere."""
    if form != "auto":
        return form
    return "console" if is_terminal() else "json"


def is_terminal() -> bool:
    """Tell whether somebody may be looking at standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def _context(_logger: Any, _method: str, event: Event) -> Event:
    request_id = bound_request()
    if request_id is not None:
        event.setdefault("request_id", request_id)
    if (trace_id := current_trace_id()) is not None:
        event["trace_id"] = trace_id
    return event


def _ordered(_logger: Any, _method: str, event: Event) -> Event:
    first = {name: event.pop(name) for name in _FIRST if name in event}
    return {**first, **event}


def _json(_logger: Any, _method: str, event: Event) -> str:
    return json.dumps(event, ensure_ascii=False)


def _readable(_logger: Any, _method: str, event: Event) -> Event:
    """Write an exception as lines, as a person reads them."""
    if isinstance(errors := event.get("exception"), list):
        lines = []
        for error in errors:
            says = " ".join(filter(None, (error["type"], error.get("code"), error.get("text"))))
            lines += [says, *(f"    {frame}" for frame in error["frames"])]
        event["exception"] = "\n".join(lines)
    return event
