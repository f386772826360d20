"""Waiting for what a release begins with: secrets and tables, made by another process."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from gateway_app import release
from gateway_app.local.secrets import create_secrets
from tasks.errors import ConfigurationError
from tasks.migrating import upgrade
from tasks.settings import PREFIX, Settings, load


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return settings of a host on which nothing was made yet."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'gateway.db'}")
    monkeypatch.setenv(f"{PREFIX}SECRETS__DIRECTORY", str(tmp_path / "secrets"))
    return load()


def test_it_waits_for_secrets_then_for_a_database(options: Settings, sqlite_template: Path, tmp_path: Path) -> None:
    """It says what is missing, once each, and goes on when nothing is."""
    told: list[str] = []

    def next_step(missing: str) -> None:
        told.append(missing)
        if len(told) == 1:
            create_secrets(options.secrets.directory)
        else:
            shutil.copy(sqlite_template, tmp_path / "gateway.db")

    release.wait(options, 60, next_step)
    assert "`flask secrets create`" in told[0]
    assert told[1] == f"sqlite:///{tmp_path / 'gateway.db'} cannot be reached"
    assert not told[2:]


def test_it_waits_for_one_more_migration(options: Settings, tmp_path: Path) -> None:
    """Tables of the release before are not enough."""
    create_secrets(options.secrets.directory)
    upgrade(options.database.url)
    assert release.lacking(options) is None
    with sqlite3.connect(tmp_path / "gateway.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0009'")
    connection.close()
    assert release.lacking(options) == "migrations 0010 are pending: `flask db upgrade`"


def test_it_gives_up(options: Settings) -> None:
    """With what is still missing; a database that is away is missing too."""
    create_secrets(options.secrets.directory)
    away = options.model_copy(
        update={"database": options.database.model_copy(update={"url": "postgresql+psycopg://127.0.0.1:1/none"})}
    )
    with pytest.raises(ConfigurationError, match=r"waited 0 s in vain: postgresql\S*/none cannot be reached"):
        release.wait(away, 0, print)
