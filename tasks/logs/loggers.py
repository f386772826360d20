"""Loggers of our own code: structlog's, over Python's, so that levels and handlers are what everybody knows.

Importing this arranges structlog, which costs nothing and shows nothing; handlers are `configure`'s. Everything but the level is
left to the formatter: a line that nobody reads is not worked on.
"""

from __future__ import annotations

import structlog
from structlog.stdlib import BoundLogger, LoggerFactory, ProcessorFormatter, filter_by_level

structlog.configure(
    processors=[filter_by_level, ProcessorFormatter.wrap_for_formatter],
    logger_factory=LoggerFactory(),
    wrapper_class=BoundLogger,
    cache_logger_on_first_use=True,
)


def get_logger(name: str) -> BoundLogger:
    """Return the logger of a module, by its `__name__`."""
    logger: BoundLogger = structlog.get_logger(name)
    return logger
