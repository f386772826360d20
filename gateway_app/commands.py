"""What the `flask` commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from tasks.errors import GatewayError


def explained(command: Callable[..., None]) -> Callable[..., None]:
    """Show the gateway's own errors as messages, not tracebacks."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except GatewayError as error:
            raise click.ClickException(f"{error.detail}\n{error.hint}") from None

    return run
