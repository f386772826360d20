"""Where lines go, and from which level on, as settings and the options of Celery and gunicorn say."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tasks import logs
from tasks.settings import LogsGroup
from tests.fleet import Gateway
from tests.services import wait_until
from tests.workers import ROOT

SOON_S = 60.0
SECRET = "xyzzy-canary"


@pytest.fixture
def arranged(tmp_path: Path) -> Iterator[Path]:
    """Return the file that this process logs to, and put its logging back at the end."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, sys.excepthook, threading.excepthook, sys.unraisablehook
    known = {name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)}
    try:
        yield tmp_path / "log"
    finally:
        for handler in root.handlers:
            if handler not in before[0]:
                handler.close()
        root.handlers, level, sys.excepthook, threading.excepthook, sys.unraisablehook = before
        root.setLevel(level)
        for name in list(logging.root.manager.loggerDict):
            logging.getLogger(name).setLevel(known.get(name, logging.NOTSET))
        logging.captureWarnings(False)
        logging.raiseExceptions = True


def events(log: Path) -> list[str]:
    """Return the events of a log."""
    return [json.loads(line)["event"] for line in log.read_text("utf-8").splitlines()]


def test_levels(arranged: Path) -> None:
    """`debug` is for our own events: a library says nothing of its insides, and SQLAlchemy shows no statement."""
    logs.configure(LogsGroup(level="debug", core_dumps=True), file=str(arranged))
    for name in ("tasks.test", "celery.worker", "gunicorn.error", "kombu.x", "sqlalchemy.engine.Engine", "urllib3.x"):
        logging.getLogger(name).debug("debug of a kind")
    logging.getLogger("sqlalchemy.engine.Engine").info("INSERT INTO")
    logs.get_logger("tasks.test").debug("ours")
    assert events(arranged) == ["debug of a kind", "debug of a kind", "ours"]


def test_what_nobody_catches(arranged: Path) -> None:
    """In a thread, in a finaliser, as a warning: each is a line, without its text."""

    def fail() -> None:
        raise ValueError(SECRET)

    class Fails:
        def __del__(self) -> None:
            fail()

    logs.configure(LogsGroup(core_dumps=True), file=str(arranged))
    thread = threading.Thread(target=fail, name="a-thread")
    thread.start()
    thread.join()
    Fails()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(SECRET, stacklevel=1)
    lines = [json.loads(line) for line in arranged.read_text("utf-8").splitlines()]
    assert [line["event"] for line in lines[:2]] == ["an exception ended a thread", "an exception could not be raised"]
    assert lines[0]["thread"] == "a-thread"
    assert lines[2]["event"].endswith("UserWarning")
    assert SECRET not in arranged.read_text("utf-8")


def test_a_second_time(arranged: Path) -> None:
    """There is one handler, and one line; the handlers of others stay where nobody wants them gone."""
    other = logging.NullHandler()
    logging.getLogger().addHandler(other)
    logs.configure(LogsGroup(core_dumps=True), file=str(arranged), hijack=False)
    logs.configure(LogsGroup(core_dumps=True), file=str(arranged), hijack=False)
    logs.get_logger("tasks.test").info("once")
    assert events(arranged) == ["once"]
    assert other in logging.getLogger().handlers
    logs.configure(LogsGroup(core_dumps=True), file=str(arranged))
    assert len(logging.getLogger().handlers) == 1


@pytest.mark.parametrize(
    ("options", "level", "shown"),
    [
        ([], "warning", False),
        (["--loglevel", "INFO"], "warning", True),
        (["--loglevel", "WARNING"], "info", False),
    ],
)
@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_celerys_options(options: list[str], level: str, shown: bool, tmp_path: Path) -> None:
    """`--loglevel` goes first, and without it the setting holds; `--logfile` has all lines, and there is no banner."""
    log = tmp_path / "celery.log"
    # The worker ends as soon as it has arranged its logging.
    code = (
        "import sys; from celery.signals import celeryd_after_setup; from gateway_app.housekeeping.celery import app\n"
        "def end(**_): import logging; logging.getLogger('celery').info('arranged'); raise SystemExit(0)\n"
        "celeryd_after_setup.connect(end)\n"
        f"app.start(['worker', '-Q', 'housekeeping', '--logfile', {str(log)!r}, *sys.argv[1:]])\n"
    )
    environment = os.environ | {"METAQORE_LOGS__LEVEL": level}
    ran = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SOON_S, check=False,
    )  # fmt: skip
    assert ("arranged" in (events(log) if log.exists() else [])) == shown, ran.stderr
    assert "transport:" not in ran.stdout


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_gunicorns_options(tmp_path: Path) -> None:
    """Files of its own for requests and for everything else; each line is JSON."""
    access, errors = tmp_path / "access.log", tmp_path / "errors.log"
    gateway = Gateway(
        tmp_path / "output", dict(os.environ), "--access-logfile", str(access), "--error-logfile", str(errors)
    )
    try:
        wait_until(lambda: access.exists() and errors.exists(), SOON_S, "the files")

        def answered() -> bool:
            try:
                return requests.get(f"{gateway.url}/healthz", timeout=SOON_S).ok
            except requests.ConnectionError:
                return False

        wait_until(answered, SOON_S, "a gateway")
        wait_until(access.read_text, SOON_S, "a line")
    finally:
        gateway.kill()
    assert any(event.startswith("Listening at: http://") for event in events(errors))
    line = json.loads(access.read_text().splitlines()[0])
    assert (line["method"], line["route"], line["status"]) == ("GET", "/healthz", 200)
