"""Arranging a process's logging: where lines go, from which level on, and what becomes of a crash."""

from __future__ import annotations

import logging
import sys
from logging.handlers import WatchedFileHandler

from tasks.logs import crashes
from tasks.logs.rendering import chosen, is_terminal, make_formatter
from tasks.settings import LogsGroup

#: The most that is asked of libraries: what they say below that is about their own insides, or quotes data. SQLAlchemy shows
#: statements with their values at INFO.
_LEAST = {
    "aiohttp": logging.INFO,
    "alembic": logging.WARNING,
    "asyncio": logging.INFO,
    "concurrent": logging.INFO,
    "flower": logging.INFO,
    "gunicorn": logging.INFO,
    "httpcore": logging.WARNING,
    "httpx": logging.WARNING,
    "kombu": logging.INFO,
    "opentelemetry": logging.INFO,
    "redis": logging.INFO,
    "sqlalchemy": logging.WARNING,
    "tornado": logging.INFO,
    "urllib3": logging.INFO,
    "werkzeug": logging.INFO,
}


def configure(options: LogsGroup, *, level: int | None = None, file: str | None = None, hijack: bool = True) -> None:
    """Have this process log as `options` say, to standard error or appending to `file`.

    `level` replaces the options' own. With `hijack` the handlers that the root logger has are removed, as nobody else is to
    write lines of another form.
    """
    handler: logging.Handler = (
        logging.StreamHandler(sys.stderr) if file is None else WatchedFileHandler(file, encoding="utf-8")
    )
    handler.setFormatter(make_formatter(chosen(options.format), colors=file is None and is_terminal()))
    root = logging.getLogger()
    for other in root.handlers[:]:
        ours = getattr(other, "of_metaqore", False)
        if hijack or ours:
            root.removeHandler(other)
        if ours:
            other.close()
    handler.of_metaqore = True  # type: ignore[attr-defined]
    root.addHandler(handler)
    root.setLevel(logging.getLevelName(options.level.upper()) if level is None else level)
    for name, least in _LEAST.items():
        logging.getLogger(name).setLevel(max(root.level, least))
    # A record that cannot be written would be printed, with what is in it.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    crashes.install(core_dumps=options.core_dumps)


def ensure(options: LogsGroup, *, level: int | None = None) -> None:
    """Configure logging, unless whoever started this process has done so in its way."""
    if not logging.getLogger().handlers:
        configure(options, level=level)
