"""A gateway on tables of another release: of a newer one it serves, of an older one it says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from click.testing import CliRunner

from gateway_app import build
from gateway_app.cli import db
from tasks.db_engine import create_engine
from tasks.migrating import MIGRATIONS, upgrade
from tasks.settings import PREFIX, DatabaseGroup, settings
from tests.conftest import new_key
from tests.upgrade import previous_release
from tests.workers import ROOT

TASK = {"agent": "incident-responder", "directive": "What now?"}


@pytest.fixture
def configured_url(database_url: str, redis_url: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Configure this process for an empty database; return its URL."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv(f"{PREFIX}ENGINE__KIND", "simulated")
    monkeypatch.setenv(f"{PREFIX}ENGINE__MODEL", str(tiny_model))
    monkeypatch.setenv(f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY", str(ROOT / "profiles"))
    settings.cache_clear()
    return database_url


def test_tables_of_the_release_before(configured_url: str) -> None:
    """The gateway starts, is not ready, and answers 503 until the tables are migrated; then it needs no new start."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = configured_url
    command.upgrade(config, previous_release.newest_revision())
    app = build(settings())
    with app.extensions["closing"]:
        client = app.test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
        ready = client.get("/readyz")
        assert (ready.status_code, "flask db upgrade" in ready.json["checks"]["database"]) == (503, True)
        refused = client.post("/v1/tasks", json=TASK)
        assert (refused.status_code, refused.json["code"]) == (503, "database_unavailable"), refused.json
        assert "flask db upgrade" in refused.json["detail"]
        assert int(refused.headers["Retry-After"]) > 0
        upgrade(configured_url)
        assert client.get("/readyz").status_code == 200
        assert client.post("/v1/tasks", json=TASK).status_code == 202


def test_tables_of_a_newer_release(configured_url: str) -> None:
    """The gateway is ready and serves; the commands say that the tables are newer, and leave them as they are."""
    upgrade(configured_url)
    engine = create_engine(DatabaseGroup(url=configured_url))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("ALTER TABLE requests ADD COLUMN of_the_next_release TEXT")
    app = build(settings())
    with app.extensions["closing"]:
        client = app.test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
        assert client.get("/readyz").json["checks"]["database"] == "ok"
        assert client.post("/v1/tasks", json=TASK).status_code == 202
    for words in ("status", "upgrade", "wait"):
        done = CliRunner().invoke(db, [words])
        assert (done.exit_code, "newer release" in done.output or words == "wait") == (0, True), done.output
    with engine.begin() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"
    engine.dispose()
