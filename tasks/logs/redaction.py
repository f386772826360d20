"""Taking out of a line what must not be in it: prompts, answers, keys, and whatever else a client sent.

Our own events are constant words with named values. A name that is not in `KEYS` is refused, and so is a value that could be
text: numbers pass, strings pass if they look like a name (an id, a class, an address) and are short. The few names whose values
are sentences of ours, which quote nothing, are in `SENTENCES`.

What libraries log is not ours to word. Of their arguments numbers pass, errors become their class, and strings pass if they
look like a name and the library knows nothing of clients (`TRUSTED`). A message that comes whole, without arguments, may have been
put together from anything: it is cut to its first line, and where the library does see what clients send, before the first mark
that could begin a quotation.

An exception becomes its class, its code if it is one of ours, and where it was raised, as its text may quote what was being
handled. The text is kept where it cannot: a module that is missing, what the operating system says, a bad configuration.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import Any

from tasks.errors import ConfigurationError, GatewayError
from tasks.ids import PATTERN as REQUEST_ID

REFUSED = "<refused>"
KEYS = frozenset(
    {
        *("timestamp", "level", "logger", "event", "exception"),
        *("request_id", "trace_id", "attempt", "epoch", "tag", "batch_id", "line"),
        *("error", "code", "at", "outcome", "state", "script", "signal"),
        *("count", "seen", "lost", "seconds", "sent", "duration_ms", "status", "method", "route"),
        *("worker", "queue", "parser", "plugin", "pid", "thread", "host", "port", "first", "tried"),
        *("detail", "hint", "why", "limits"),
    }
)
#: Their values are the project's own sentences. `limits` is what an engine says of its sizes, `thread` a thread's name.
SENTENCES = frozenset({"event", "detail", "hint", "why", "limits", "thread"})
#: Up to which level the strings among a library's arguments are shown. From there on gunicorn quotes what clients send.
TRUSTED = {
    "alembic": logging.CRITICAL,
    "celery": logging.CRITICAL,
    "flower": logging.WARNING,
    "gunicorn": logging.INFO,
    "kombu": logging.CRITICAL,
    "vllm": logging.CRITICAL,
}
#: vLLM says so before it has taken any request, and without the text nobody could tell what is wrong.
_BEFORE_ANY_REQUEST = frozenset({"EngineCore failed to start."})
_NAME = re.compile(r"[\w.:@/+*<>\[\],=-]{0,200}", re.ASCII)
#: A message's tag is a request's id with its epoch, an engine's request that with its attempt.
_FORMS = {"request_id": re.compile(REQUEST_ID), "tag": re.compile(REQUEST_ID + r"[:-]\d{1,9}")}
_QUOTING = re.compile(r"[\"'`<({\[:=]")
_SENTENCE_CHARACTERS = 1000
_MESSAGE_CHARACTERS = 300
_FRAMES = 40

#: What structlog hands from one processor to the next.
Event = MutableMapping[str, Any]


def refuse_unknown(_logger: Any, _method: str, event: Event) -> Event:
    """Replace what may not be in a line by REFUSED, by its name or its value."""
    return {name: _value(name, value) if name in KEYS else REFUSED for name, value in event.items()}


def _value(name: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float) or name == "exception":
        return value
    if not isinstance(value, str):
        return REFUSED
    if (form := _FORMS.get(name)) is not None:
        return value if form.fullmatch(value) else REFUSED
    if name in SENTENCES:
        return value[:_SENTENCE_CHARACTERS]
    return value if _NAME.fullmatch(value) else REFUSED


def foreign(_logger: Any, _method: str, event: Event) -> Event:
    """Word the message of a library's record, from its template and what may be shown of its arguments."""
    record: logging.LogRecord = event["_record"]
    template, arguments = event["event"], event.pop("positional_args", None)
    trusted = record.levelno <= TRUSTED.get(record.name.partition(".")[0], logging.NOTSET)
    if record.name == "py.warnings":
        # "path:line: Category: text", and the text may quote a value.
        text = ":".join(str(arguments[0] if arguments else template).split(":")[:3])
    elif not arguments:
        text = template if trusted else _QUOTING.split(template, 1)[0]
    else:
        text = _worded(template, arguments, strings=trusted)
    event["event"] = text.strip().partition("\n")[0][:_MESSAGE_CHARACTERS]
    if template in _BEFORE_ANY_REQUEST and isinstance(event.get("exc_info"), tuple):
        event["detail"] = str(event["exc_info"][1])
    return event


def _worded(template: Any, arguments: Any, *, strings: bool) -> str:
    shown: Any
    if isinstance(arguments, Mapping):
        shown = {name: _argument(value, strings=strings) for name, value in arguments.items()}
    else:
        shown = tuple(_argument(value, strings=strings) for value in arguments)
    try:
        return str(template % shown)
    except (TypeError, ValueError, KeyError):
        # A number was wanted where there is none to show.
        return str(template)


def _argument(value: Any, *, strings: bool) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and strings and _NAME.fullmatch(value):
        return value
    return f"<{type(value).__name__}>"


def exceptions(_logger: Any, _method: str, event: Event) -> Event:
    """Replace an exception by what may be said of it and of those that led to it, the last one first."""
    info = event.pop("exc_info", None)
    event.pop("stack_info", None)
    if info is True:
        info = sys.exc_info()
    error = info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        event["exception"] = described(error)
    return event


def described(error: BaseException) -> list[dict[str, Any]]:
    """Return an exception's class, code and frames, and those of what caused it."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        one: dict[str, Any] = {"type": type(current).__qualname__}
        if isinstance(current, GatewayError):
            one["code"] = current.code
        if text := _text(current):
            one["text"] = text[:_SENTENCE_CHARACTERS]
        one["frames"] = _frames(current.__traceback__)
        found.append(one)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def _text(error: BaseException) -> str | None:
    if isinstance(error, ConfigurationError):
        return error.detail
    if isinstance(error, ImportError):
        return str(error)
    return error.strerror if isinstance(error, OSError) else None


def _frames(traceback: TracebackType | None) -> list[str]:
    """Return "file:line function" for each frame, the innermost last; of very many, the innermost ones."""
    frames: list[str] = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        frames.append(f"{code.co_filename}:{traceback.tb_lineno} {code.co_name}")
        traceback = traceback.tb_next
    return frames[-_FRAMES:]
