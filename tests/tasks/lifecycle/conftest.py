"""A migrated database of each kind, which the tests share: each has requests of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from tasks.db_engine import create_engine
from tasks.migrating import upgrade
from tasks.settings import DatabaseGroup
from tests.services import PostgresServer


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def engine(
    request: pytest.FixtureRequest, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Return an engine on a migrated database."""
    if request.param == "sqlite":
        path = shutil.copy(sqlite_template, tmp_path_factory.mktemp("lifecycle"))
        url = f"sqlite:///{path}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.migrated_url(upgrade)
    engine = create_engine(DatabaseGroup(url=url))
    yield engine
    engine.dispose()
