"""Logging of Celery's processes, whose own arrangement ours replaces; import it to have it so.

`--loglevel`, `--logfile` and `worker_hijack_root_logger` do what they always do. Celery's default level, WARNING, is not meant by anybody:
without `--loglevel` the setting `logs.level` holds. The banner is shown where lines are for a person.
"""

from __future__ import annotations

from typing import Any

import click
from celery import current_app
from celery.signals import celeryd_init, setup_logging
from click.core import ParameterSource

from tasks.logs.configuring import configure
from tasks.logs.rendering import chosen
from tasks.settings import settings


@setup_logging.connect  # type: ignore[untyped-decorator]
def _configure(loglevel: int | None, logfile: str | None, **_signal: Any) -> None:
    """Arrange logging; that somebody listens to this signal keeps Celery from doing so itself."""
    configure(
        settings().logs,
        level=loglevel if _is_meant() else None,
        file=logfile,
        hijack=current_app.conf.worker_hijack_root_logger,
    )


def _is_meant() -> bool:
    """Tell whether somebody asked for the level: on the command line, or in code, where there is none."""
    context = click.get_current_context(silent=True)
    if context is None or "loglevel" not in context.params:
        return True
    return context.get_parameter_source("loglevel") is not ParameterSource.DEFAULT


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _without_banner(instance: Any, **_signal: Any) -> None:
    """Leave out what is no event, where something reads the lines."""
    if chosen(settings().logs.format) == "json":
        instance.quiet = True
