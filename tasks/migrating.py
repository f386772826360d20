"""Migrating the database: bringing its tables to the newest revision, and telling what they lack.

A migration runs while the release before serves, so it only adds what that release does not miss: nullable columns, tables,
indices (tests/upgrade holds every migration to that). And it must not hold up those who write. A change of a PostgreSQL
table waits for everybody who uses the table, and everybody who comes later waits behind it; so it waits for
`LOCK_TIMEOUT_S` only, lets the others go on, and tries again. Two upgrades never run at once: the later one waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import ResolutionError
from alembic.util import CommandError
from sqlalchemy.engine import Connection, make_url

from tasks.db_engine import create_engine
from tasks.errors import ConfigurationError
from tasks.settings import DatabaseGroup

MIGRATIONS = Path(__file__).resolve().parents[1] / "migrations"
#: Less than the 5 s for which those who write wait (`database.timeout_s`).
LOCK_TIMEOUT_S = 2.0
PAUSE_S = 1.0
PATIENCE_S = 300.0
#: PostgreSQL's codes for a lock that did not come in time, and for one that never could.
_IN_THE_WAY = ("55P03", "40P01")


class UpgradeUnderWay(Exception):
    """Another process migrates the same database."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What the tables are, beside what this release needs.

    `pending` are the revisions that it needs and they lack, oldest first. `is_newer` tells that they are of a newer release;
    this one runs on them all the same if it is the one just before.
    """

    revision: str | None
    pending: tuple[str, ...]
    is_newer: bool


def upgrade(url: str, say: Callable[[str], None] = lambda _why: None, patience_s: float = PATIENCE_S) -> None:
    """Create or migrate the tables at `url` to the newest revision; tables of a newer release are left as they are.

    `say` is told what is waited for, each time. Raises ConfigurationError if the tables cannot be migrated, or not within
    `patience_s`.
    """
    _make_private(url)
    until = time.monotonic() + patience_s
    while (obstacle := _try_to_upgrade(url)) is not None:
        if time.monotonic() >= until:
            raise ConfigurationError(f"the database cannot be migrated: waited {patience_s:.0f} s, and {obstacle}")
        say(f"{obstacle}; trying again")
        time.sleep(PAUSE_S)


def read_schema(connection: Connection) -> Schema:
    """Return what the database's tables are."""
    script = ScriptDirectory.from_config(_alembic(""))
    revision = MigrationContext.configure(connection).get_current_revision()
    try:
        found = [item.revision for item in script.iterate_revisions("head", revision or "base")]
    except (CommandError, ResolutionError):
        return Schema(revision, (), is_newer=True)
    return Schema(revision, tuple(found[::-1]), is_newer=False)


def pending_migrations(connection: Connection) -> list[str]:
    """Return the revisions this code needs and the database lacks, oldest first."""
    return list(read_schema(connection).pending)


def _make_private(url: str) -> None:
    """Make the file of a new SQLite database, before SQLite makes one that everybody may read. Its other files follow it."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database.startswith((":", "file:")):
        return
    path = Path(parsed.database)
    # What cannot be made is told when the database is used.
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600, exist_ok=True)


def _try_to_upgrade(url: str) -> str | None:
    """Migrate; return what is in the way for now, or None if it is done. Raises ConfigurationError."""
    try:
        if not _is_newer(url):
            command.upgrade(_alembic(url), "head")
    except UpgradeUnderWay:
        return "another upgrade is running"
    except (sa.exc.DBAPIError, sa.exc.TimeoutError, CommandError) as error:
        if getattr(getattr(error, "orig", None), "sqlstate", None) in _IN_THE_WAY:
            return f"a table was in use for longer than {LOCK_TIMEOUT_S:.0f} s"
        # The first line says what is wrong; a later one may quote a row.
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise ConfigurationError(f"the database cannot be migrated: {reason}") from None
    return None


def _is_newer(url: str) -> bool:
    engine = create_engine(DatabaseGroup(url=url))
    try:
        with engine.connect() as connection:
            return read_schema(connection).is_newer
    finally:
        engine.dispose()


def _alembic(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config
