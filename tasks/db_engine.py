"""Engines: how this process's connections to SQLite and to PostgreSQL are set up, and how SQLite's transactions begin."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, make_url

from tasks.settings import DatabaseGroup

#: How long a writer sleeps before it looks again whether SQLite's write lock is free. SQLite's own waiting sleeps for longer
#: each time, up to 0.1 s, where a transaction of another process takes a few milliseconds.
_LOCK_POLL_S = 0.001


def create_engine(settings: DatabaseGroup, pool_size: int = 5) -> Engine:
    """Return an engine with up to `pool_size` durable connections to `settings.url`, each wait on them bounded."""
    url = make_url(settings.url)
    if url.get_backend_name() == "sqlite":
        if url.database:
            Path(url.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        engine = sa.create_engine(
            url,
            pool_size=pool_size,
            pool_timeout=settings.timeout_s,
            hide_parameters=True,
            connect_args={"timeout": settings.timeout_s},
        )
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", lambda connection: _begin_sqlite(connection, settings.timeout_s))
        return engine
    milliseconds = int(settings.timeout_s * 1000)
    return sa.create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=settings.timeout_s,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args={
            "connect_timeout": max(1, round(settings.timeout_s)),
            "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
            "tcp_user_timeout": milliseconds,
        },
    )


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own transaction handling is switched off: `_begin_sqlite` decides how a transaction starts.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection, timeout_s: float) -> None:
    if connection.get_execution_options().get("immediate"):
        _take_write_lock(connection, timeout_s)
    else:
        connection.exec_driver_sql("BEGIN")


def _take_write_lock(connection: Connection, timeout_s: float) -> None:
    """Begin a transaction that writes, as soon as no other does. Raises OperationalError after `timeout_s`."""
    driver: Any = connection.connection.driver_connection
    until = time.monotonic() + timeout_s
    driver.execute("PRAGMA busy_timeout=0")
    try:
        while time.monotonic() < until:
            try:
                driver.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    break
                time.sleep(_LOCK_POLL_S)
            else:
                return
        # What it says to this is what the caller is told.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        driver.execute(f"PRAGMA busy_timeout={int(timeout_s * 1000)}")
