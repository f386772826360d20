"""A line as it is written: who says what, when, and on which request; in both forms."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tasks.errors import ConfigurationError, EngineFailed
from tasks.ids import new_request_id
from tasks.logs import bind_request, get_logger, make_formatter
from tasks.logs.rendering import Form

SECRET = "xyzzy-canary"
Write = Callable[[logging.Logger], None]


@contextmanager
def lines_of(name: str, form: Form = "json") -> Iterator[io.StringIO]:
    """Have a logger write to the stream that is returned, and to no other."""
    logger, stream = logging.getLogger(name), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(make_formatter(form))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        logger.setLevel(before[0])


def line_of(name: str, write: Write) -> dict[str, Any]:
    """Return the one line that `write` has a library's logger write."""
    with lines_of(name) as stream:
        write(logging.getLogger(name))
    (line,) = stream.getvalue().splitlines()
    said: dict[str, Any] = json.loads(line)
    return said


def own_line(**values: Any) -> dict[str, Any]:
    """Return the line of an event of ours."""
    with lines_of("tasks.test") as stream:
        get_logger("tasks.test").warning("something happened", **values)
    (line,) = stream.getvalue().splitlines()
    said: dict[str, Any] = json.loads(line)
    return said


@pytest.fixture(autouse=True)
def unbound() -> Iterator[None]:
    """Begin and end without a request."""
    bind_request(None)
    yield
    bind_request(None)


# --- Our own events -------------------------------------------------------------------------------


def test_an_event() -> None:
    """When, how bad, where, what, and its values, in this order."""
    request_id = new_request_id()
    line = own_line(attempt=2, request_id=request_id, code="engine_failed", seconds=0.5)
    assert list(line) == ["timestamp", "level", "logger", "event", "request_id", "attempt", "code", "seconds"]
    at = datetime.fromisoformat(line.pop("timestamp"))
    assert at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)
    assert line == {
        "level": "warning",
        "logger": "tasks.test",
        "event": "something happened",
        "request_id": request_id,
        "attempt": 2,
        "code": "engine_failed",
        "seconds": 0.5,
    }


def test_a_request_is_bound_to_thread_and_task() -> None:
    """Each asyncio task has its own, a thread that it asks has the same; what is named goes before what is bound."""
    ids = [new_request_id() for _ in range(3)]

    async def handle(request_id: str) -> list[str]:
        bind_request(request_id)
        await asyncio.sleep(0)
        return [own_line()["request_id"], (await asyncio.to_thread(own_line))["request_id"]]

    async def handle_all() -> list[list[str]]:
        return [await one for one in [asyncio.create_task(handle(request_id)) for request_id in ids]]

    assert asyncio.run(handle_all()) == [[request_id] * 2 for request_id in ids]
    assert "request_id" not in own_line()
    bind_request(ids[0])
    assert own_line(request_id=ids[1])["request_id"] == ids[1]


def test_a_level_that_nobody_wants_costs_nothing() -> None:
    """Its values are not even looked at."""
    logging.getLogger("tasks.quiet").setLevel(logging.WARNING)
    with lines_of("tasks.quiet") as stream:
        logging.getLogger("tasks.quiet").setLevel(logging.WARNING)
        get_logger("tasks.quiet").info("something happened", detail=object())
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", SECRET),
        ("prompt", 5),
        ("error", f"the {SECRET} is here"),
        ("code", {"text": SECRET}),
        ("code", SECRET.encode()),
        ("why", [SECRET]),
        ("tag", SECRET),
        ("request_id", SECRET),
        ("route", SECRET + "?"),
        ("error", SECRET * 50),
    ],
)
def test_what_may_not_be_there_is_refused(name: str, value: Any) -> None:
    """A name that nobody has allowed, a value that may be text, or one that is not what its name says."""
    line = own_line(**{name: value})
    assert line[name] == "<refused>"
    assert SECRET not in json.dumps(line)


def test_a_line_that_cannot_be_rendered() -> None:
    """It says so, and `logging` does not print what was in it."""

    class Rude(str):
        __slots__ = ()

        def __getitem__(self, _key: object) -> str:
            raise ValueError(SECRET)

    assert own_line(why=Rude(SECRET)) == {
        "level": "error",
        "event": "a line could not be rendered",
        "error": "ValueError",
    }


# --- Exceptions -----------------------------------------------------------------------------------


def raise_deep() -> None:
    """Raise an error that another one led to; both quote."""
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise EngineFailed(f"no {SECRET}") from error


def test_an_exception_is_told_without_its_text() -> None:
    """Class, code and frames, and those of what caused it; no text, no source line, no value."""
    try:
        raise_deep()
    except EngineFailed:
        line = own_line(exc_info=True)
    last, first = line["exception"]
    assert (last["type"], last["code"]) == ("EngineFailed", EngineFailed.code)
    assert first["type"] == "KeyError"
    assert [frame.rpartition(" ")[2] for frame in last["frames"]] == [
        "test_an_exception_is_told_without_its_text",
        "raise_deep",
    ]
    assert SECRET not in json.dumps(line)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModuleNotFoundError("No module named 'gone'"), "No module named 'gone'"),
        (FileNotFoundError(2, "No such file or directory", SECRET), "No such file or directory"),
        (ConfigurationError("gateway.port is no number"), "gateway.port is no number"),
    ],
)
def test_an_exception_that_quotes_nothing_keeps_its_text(error: Exception, text: str) -> None:
    """Nobody could mend it otherwise."""
    line = own_line(exc_info=error)
    assert line["exception"][0]["text"] == text
    assert SECRET not in json.dumps(line)


def test_exceptions_that_lead_in_a_circle() -> None:
    """Each is told once."""
    first, second = ValueError(), TypeError()
    first.__cause__, second.__cause__ = second, first
    assert [one["type"] for one in own_line(exc_info=first)["exception"]] == ["ValueError", "TypeError"]


# --- Libraries ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write", "event"),
    [
        ("celery.worker", lambda log: log.info("Connected to %s", "redis://h:1/0"), "Connected to redis://h:1/0"),
        ("celery.worker", lambda log: log.error("lost %s after %d", OSError(SECRET), 3), "lost <OSError> after 3"),
        ("celery.worker", lambda log: log.info("Task %(id)s: %(r)s", {"id": "a-1", "r": [SECRET]}), "Task a-1: <list>"),
        ("celery.worker", lambda log: log.info("says %s", f"the {SECRET}"), "says <str>"),
        ("gunicorn.error", lambda log: log.info("Listening at: %s (%s)", "http://[::1]:80", 7),
         "Listening at: http://[::1]:80 (7)"),
        ("gunicorn.error", lambda log: log.error("Error handling request %s", f"/{SECRET}"), "Error handling request <str>"),
        ("gunicorn.error", lambda log: log.warning(f"Invalid request from ip=::1: {SECRET}"), "Invalid request from ip"),  # noqa: G004
        ("asyncio", lambda log: log.error(f"Exception in callback f('{SECRET}')\nhandle: <{SECRET}>"),  # noqa: G004
         "Exception in callback f"),
        ("unheard.of", lambda log: log.error("cannot take %s", SECRET), "cannot take <str>"),
        ("unheard.of", lambda log: log.error("cannot take %d", SECRET), "cannot take %d"),
        ("py.warnings", lambda log: log.warning("%s", f"a.py:3: UserWarning: {SECRET}\n  f({SECRET})\n"),
         "a.py:3: UserWarning"),
    ],
)  # fmt: skip
def test_a_librarys_line(name: str, write: Write, event: str) -> None:
    """Its template, with the arguments that may be shown."""
    line = line_of(name, write)
    assert (line["event"], line["logger"]) == (event, name)
    assert SECRET not in json.dumps(line)


def test_an_engine_that_does_not_start_says_why() -> None:
    """No request has come to it yet, and nothing else would tell what is wrong."""

    def write(log: logging.Logger) -> None:
        try:
            raise ValueError("the model needs more memory")
        except ValueError:
            log.exception("EngineCore failed to start.")

    assert line_of("vllm.v1.engine.core", write)["detail"] == "the model needs more memory"


# --- For a person ---------------------------------------------------------------------------------


def test_a_line_for_a_person() -> None:
    """The same on one line, and an exception below it."""
    with lines_of("tasks.test", "console") as stream:
        try:
            raise_deep()
        except EngineFailed:
            get_logger("tasks.test").error("something failed", attempt=3, exc_info=sys.exc_info())
    first, *rest = stream.getvalue().splitlines()
    assert "something failed" in first
    assert "attempt=3" in first
    assert rest[0] == f"EngineFailed {EngineFailed.code}"
    assert SECRET not in stream.getvalue()
