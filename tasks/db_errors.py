"""How a database's failures are told: which mean that it is away, and what callers and logs may see of them.

A commit is the one step whose failure leaves its outcome open: the connection may be lost after the database has
committed and before it could say so. That is an error of its own, so that whoever must know can find out.
"""

from __future__ import annotations

import sqlalchemy as sa

from tasks.errors import DatabaseUnavailable
from tasks.logs import get_logger

#: How drivers and pool say that the database cannot be reached, is locked, is full, or takes too long.
_AWAY = (sa.exc.OperationalError, sa.exc.TimeoutError, sa.exc.InterfaceError)
#: PostgreSQL's code for writing to a server that only lets read, as one does that is no longer the primary.
_READ_ONLY = "25006"
#: PostgreSQL's codes for a table and a column that are not there, and SQLite's words for it.
_LACKING = ("42P01", "42703")
_LACKING_ON_SQLITE = ("no such table", "no such column", "has no column named")
logger = get_logger(__name__)


class CommitUndecided(DatabaseUnavailable):
    """The database went away while it committed, so the request may or may not have been accepted."""

    hint = "Ask for it by its id after Retry-After, or send it again with the same Idempotency-Key."


def is_away(error: BaseException) -> bool:
    """Tell whether `error` means that the database cannot take work now, whatever the work is."""
    return isinstance(error, _AWAY) or is_read_only(error) or _lacks_something(error)


def is_read_only(error: BaseException) -> bool:
    """Tell whether the server on this connection only lets read. Another connection may lead to one that does not."""
    return isinstance(error, sa.exc.DBAPIError) and getattr(error.orig, "sqlstate", None) == _READ_ONLY


def _lacks_something(error: BaseException) -> bool:
    """Tell whether the tables are of an older release, or not there yet: what was asked may work once they are migrated."""
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    if getattr(error.orig, "sqlstate", None) in _LACKING:
        return True
    return isinstance(error, sa.exc.OperationalError) and any(words in str(error.orig) for words in _LACKING_ON_SQLITE)


def unavailable(error: Exception, *, undecided: bool = False) -> DatabaseUnavailable:
    """Return what callers are told; `undecided` says that it failed at the commit."""
    if _lacks_something(error):
        logger.error("the tables are older than this release: run `flask db upgrade`")
        return DatabaseUnavailable("the database is not migrated to this release yet; `flask db upgrade` does it")
    # The driver's text may quote statements and their values, so only its class is logged.
    logger.warning("database unavailable", error=type(getattr(error, "orig", None) or error).__name__)
    return CommitUndecided() if undecided else DatabaseUnavailable()


def as_told(error: Exception) -> Exception:
    """Return what the caller of a function that raised `error` is told."""
    return unavailable(error) if is_away(error) else _without_values(error)


def _without_values(error: Exception) -> Exception:
    """Return a database's error without its text: PostgreSQL's quotes the row that it refuses."""
    if not isinstance(error, sa.exc.DBAPIError):
        return error
    original = error.orig
    name = getattr(original, "sqlstate", None) or getattr(original, "sqlite_errorname", None) or ""
    told = type(error)(None, None, Exception(f"{type(original).__name__} {name}".strip()))
    told.__suppress_context__ = True
    return told
