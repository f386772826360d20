"""What the `flask` commands share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime, time
from typing import Any

import click

from gateway_app.audit.events import in_utc
from tasks import logs
from tasks.errors import ConfigurationError, GatewayError
from tasks.settings import settings


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Show the gateway's own errors as messages, not tracebacks."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        # A command that needs no configuration, or says what is wrong with it, runs without.
        with suppress(ConfigurationError):
            logs.ensure(settings().logs, level=logging.WARNING)
        try:
            command(*args, **kwargs)
        except GatewayError as error:
            raise click.ClickException(f"{error.detail}\n{error.hint}") from None

    return run


def check_printable(text: str, longest: int, option: str) -> None:
    """Raise BadParameter unless `text` has 1 to `longest` printable characters, as the tables hold."""
    if not 1 <= len(text) <= longest or not text.isprintable():
        raise click.BadParameter(f"must be 1 to {longest} printable characters", param_hint=option)


class Moment(click.ParamType[datetime]):
    """A date, which begins at midnight UTC, or an instant with its offset."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return the instant that was written."""
        with suppress(ValueError):
            return datetime.combine(date.fromisoformat(value), time(), UTC)
        with suppress(ValueError):
            moment = datetime.fromisoformat(value)
            if moment.tzinfo is not None:
                return in_utc(moment)
        return self.fail(
            "must be a date such as 2026-01-31, or a time with its offset such as 2026-01-31T09:00:00Z", param, ctx
        )
