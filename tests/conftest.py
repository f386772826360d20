"""Fixtures for all tests: settings of their own, and real services.

A service is started once per test process, so once per worker under pytest-xdist, and every test gets it empty.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.settings import CONFIG_VARIABLE, KEY_BYTES, PREFIX, SECRET_NAMES, settings
from tests.services import PostgresServer, RedisServer


@pytest.fixture(autouse=True)
def secrets_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test default settings and fresh secrets, whose folder is returned.

    The developer's own environment, gateway.json and var/ are out of reach.
    """
    for name in os.environ:
        if name.startswith(PREFIX) or name in ("REDIS_URL", "DATABASE_URL"):
            monkeypatch.delenv(name)
    folder = tmp_path_factory.mktemp("settings")
    (folder / "gateway.json").write_text("{}", encoding="utf-8")
    directory = folder / "secrets"
    directory.mkdir(mode=0o700)
    for name in SECRET_NAMES:
        (directory / name).write_text(secrets.token_hex(KEY_BYTES) + "\n", encoding="ascii")
    monkeypatch.setenv(CONFIG_VARIABLE, str(folder / "gateway.json"))
    monkeypatch.setenv(f"{PREFIX}SECRETS__DIRECTORY", str(directory))
    settings.cache_clear()
    yield directory
    settings.cache_clear()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """Return the Redis that all tests of this process share. Do not stop it: that is what `own_redis` is for."""
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """Return the URL of an empty Redis."""
    redis_server.empty()
    return redis_server.url


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """Return a running Redis that belongs to this test, to be killed and started at will."""
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Return the PostgreSQL that all tests of this process share."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """Return the URL of an empty PostgreSQL database, deleted after the test."""
    name = postgres_server.create_database()
    yield postgres_server.url(name)
    postgres_server.drop_database(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database without tables; the test runs once for each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'gateway.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url
