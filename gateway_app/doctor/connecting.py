"""Connections that do not wait for long, and the words for where they lead, without passwords."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
import sqlalchemy as sa
from sqlalchemy.engine import Connection, make_url

from tasks.db_engine import create_engine
from tasks.errors import DatabaseUnavailable
from tasks.queueing.address import parse
from tasks.queueing.connecting import connect
from tasks.settings import DatabaseGroup, Settings

#: The longest wait for one answer of a service.
TIMEOUT_S = 3.0
#: What a client of Redis raises where Redis, or the Sentinel that should name it, cannot be asked.
QUEUE_AWAY = (redis.RedisError, OSError)


@contextmanager
def redis_client(settings: Settings) -> Iterator[redis.Redis]:
    """Yield a client of the configured Redis."""
    with connect(settings.gateway.request_queue_url, TIMEOUT_S, connections=1) as client:
        yield client


@contextmanager
def reading(settings: Settings) -> Iterator[Connection]:
    """Yield a connection to the database, which changes nothing. Raises SQLAlchemyError or DatabaseUnavailable."""
    path = sqlite_path(settings)
    if path is None and is_sqlite(settings):
        raise DatabaseUnavailable
    if path is None:
        engine = create_engine(DatabaseGroup(url=settings.database.url, timeout_s=TIMEOUT_S), pool_size=1)
    else:
        # The gateway's own way to connect would make the file, and set its journal's mode.
        place = f"{path.absolute().as_uri()}?mode=ro"
        engine = sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(place, uri=True, timeout=TIMEOUT_S))
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def redis_place(settings: Settings) -> str:
    """Return where Redis is."""
    address = parse(settings.gateway.request_queue_url)
    places = ", ".join(f"{host}:{port}" for host, port in address.hosts)
    return f"{address.master_name} by the Sentinels {places}" if address.master_name else places


def database_place(settings: Settings) -> str:
    """Return where the database is: its URL with the password masked."""
    return make_url(settings.database.url).set(query={}).render_as_string(hide_password=True)


def is_sqlite(settings: Settings) -> bool:
    """Tell whether the database is SQLite's."""
    return make_url(settings.database.url).get_backend_name() == "sqlite"


def sqlite_path(settings: Settings) -> Path | None:
    """Return the file of an SQLite database, or None for another one, or one in memory."""
    name = make_url(settings.database.url).database
    return Path(name) if is_sqlite(settings) and name and name != ":memory:" else None
