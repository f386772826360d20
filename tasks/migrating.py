"""Migrating the database: bringing its tables to the newest revision, and telling what they lack."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy.engine import Connection

from tasks.errors import ConfigurationError

MIGRATIONS = Path(__file__).resolve().parents[1] / "migrations"


def _alembic(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config


def upgrade(url: str) -> None:
    """Create or migrate the tables at `url` to the newest revision. Raises ConfigurationError if it cannot."""
    try:
        command.upgrade(_alembic(url), "head")
    except (sa.exc.DBAPIError, sa.exc.TimeoutError, CommandError) as error:
        # The first line says what is wrong; a later one may quote a row.
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise ConfigurationError(f"the database cannot be migrated: {reason}") from None


def pending_migrations(connection: Connection) -> list[str]:
    """Return the revisions this code needs and the database lacks, oldest first."""
    script = ScriptDirectory.from_config(_alembic(""))
    current = MigrationContext.configure(connection).get_current_revision()
    try:
        return [revision.revision for revision in script.iterate_revisions("head", current or "base")][::-1]
    except (CommandError, ResolutionError):
        raise ConfigurationError(
            f"the database is at revision {current}, which this release does not know: it is of a newer one"
        ) from None
