"""What must be done once before the processes of a release start: secrets and tables.

Where several processes are started at once, as by honcho, Compose or Kubernetes, nobody says which of them comes first. So
one of them does the work (`flask secrets create && flask db upgrade`), and each of the others waits until it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import sqlalchemy as sa

from gateway_app.doctor.connecting import database_place, reading
from tasks.errors import ConfigurationError, GatewayError
from tasks.migrating import pending_migrations
from tasks.settings import SECRET_NAMES, Settings

_PAUSE_S = 0.5


def lacking(options: Settings) -> str | None:
    """Return what is still missing, or None. Whatever cannot be reached or read yet is missing too."""
    try:
        for name in SECRET_NAMES:
            options.secrets.keys(name)
        with reading(options) as connection:
            pending = pending_migrations(connection)
    except sa.exc.SQLAlchemyError:
        return f"{database_place(options)} cannot be reached"
    except GatewayError as error:
        return error.detail
    return f"migrations {', '.join(pending)} are pending: `flask db upgrade`" if pending else None


def wait(options: Settings, timeout_s: float, say: Callable[[str], None]) -> None:
    """Return once nothing is missing; `say` is told what is, each time that changes.

    Raises ConfigurationError when it still is after `timeout_s`.
    """
    until = time.monotonic() + timeout_s
    told = None
    while missing := lacking(options):
        if time.monotonic() >= until:
            raise ConfigurationError(f"waited {timeout_s:.0f} s in vain: {missing}")
        if missing != told:
            say(missing)
            told = missing
        time.sleep(_PAUSE_S)
