"""What can be wrong with a database, made real on both kinds, is found."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import make_url

from gateway_app import build
from gateway_app.doctor import database, sqlite_file
from tasks.migrating import MIGRATIONS
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.gateway_app.doctor.conftest import Find
from tests.workers import ROOT


@pytest.fixture
def url(migrated_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a migrated database, which is configured."""
    monkeypatch.setenv("DATABASE_URL", migrated_url)
    return migrated_url


@pytest.fixture
def execute(url: str) -> Iterator[Callable[[str], None]]:
    """Return a function that runs a statement as the database's owner."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)

    def run(statement: str) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)

    yield run
    engine.dispose()


def test_a_migrated_one(url: str, find: Find) -> None:
    """It answers, and nothing is pending."""
    found = find(database.examine)
    assert (found["database"].status, found["migrations"].status) == ("ok", "ok")


def test_pending_migrations_are_found(database_url: str, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers, and the command."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    command.upgrade(config, "0007")
    monkeypatch.setenv("DATABASE_URL", database_url)
    finding = find(database.examine)["migrations"]
    assert (finding.status, finding.remedy) == ("fail", "flask db upgrade")
    assert "0008" in finding.says


def test_tables_of_a_newer_release(url: str, find: Find, execute: Callable[[str], None]) -> None:
    """An upgrade is not finished on this host."""
    [before] = _column(url, "SELECT version_num FROM alembic_version")
    execute("UPDATE alembic_version SET version_num = '9999'")
    try:
        assert find(database.examine)["migrations"].status == "warn"
    finally:
        execute(f"UPDATE alembic_version SET version_num = '{before}'")


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_missing_file(database_url: str, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not made by looking for it."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    finding = find(database.examine)["database"]
    assert (finding.status, finding.remedy) == ("fail", "flask db upgrade")
    assert not Path(str(make_url(database_url).database)).exists()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory(find: Find, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """It would forget everything."""
    monkeypatch.setenv("DATABASE_URL", url)
    assert "in memory" in find(database.examine)["database"].says
    assert find(sqlite_file.examine) == {}


def test_a_dead_postgresql(find: Find, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is told without its password."""
    monkeypatch.setenv("DATABASE_URL", f"postgresql://gateway:hunter2@/gateway?host={tmp_path}")
    finding = find(database.examine)["database"]
    assert (finding.status, "OperationalError" in finding.says, "hunter2" in str(finding)) == ("fail", True, False)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_roles(url: str, find: Find, execute: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner may drop triggers; a role with too many rights is told, and one with too few; one with the right ones is well."""
    assert "owns" in find(database.examine)["audit rights"].says
    execute("CREATE ROLE served LOGIN")
    monkeypatch.setenv("DATABASE_URL", make_url(url).set(username="served").render_as_string())
    try:
        assert "GRANT SELECT" in find(database.examine)["database checks"].remedy
        execute("GRANT SELECT ON alembic_version TO served")
        found = find(database.examine)
        assert ("requests" in found["database rights"].says, found["database rights"].status) == (True, "fail")
        execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO served")
        found = find(database.examine)
        assert (found["database rights"].status, found["audit rights"].status) == ("ok", "warn")
        assert "REVOKE UPDATE, DELETE, TRUNCATE ON audit_events FROM served" in found["audit rights"].remedy
        execute("REVOKE UPDATE, DELETE, TRUNCATE ON audit_events FROM served")
        assert find(database.examine)["audit rights"].status == "ok"
        execute("ALTER ROLE served SET default_transaction_read_only = on")
        assert find(database.examine)["database writes"].status == "fail"
    finally:
        execute("DROP OWNED BY served")
        execute("DROP ROLE served")


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_a_gateway_that_cannot_change_the_record(
    configured: None, migrated_url: str, find: Find, execute: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rights that the page gives its role, and no more, it serves."""
    page = (ROOT / "docs" / "doctor.md").read_text("utf-8")
    execute("CREATE ROLE gateway LOGIN")
    for statement in page.split("```sql")[1].split("```")[0].strip().splitlines():
        execute(statement)
    monkeypatch.setenv("DATABASE_URL", make_url(migrated_url).set(username="gateway").render_as_string())
    try:
        found = find(database.examine)
        assert (found["audit rights"].status, found["database rights"].status) == ("ok", "ok")
        app = build(settings())
        with app.extensions["closing"]:
            client = app.test_client()
            client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
            answer = client.post("/v1/tasks", json={"agent": "incident-responder", "directive": "What now?"})
            assert answer.status_code == 202, answer.json
            assert client.delete(answer.json["links"]["self"]).status_code == 200
    finally:
        execute("DROP OWNED BY gateway")
        execute("DROP ROLE gateway")


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_too_few_connections(url: str, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process more would not get those that it may want."""
    assert find(database.examine)["database connections"].status == "ok"
    monkeypatch.setenv(f"{PREFIX}DATABASE__POOL_SIZE", "500")
    finding = find(database.examine)["database connections"]
    assert (finding.status, "501" in finding.says) == ("fail", True)


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_durability(url: str, find: Find, execute: Callable[[str], None]) -> None:
    """The tests' own PostgreSQL does not wait for the disk, and that is found."""
    finding = find(database.examine)["database durability"]
    assert (finding.status, "fsync" in finding.says) == ("fail", True)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_file_in_another_mode(url: str, find: Find) -> None:
    """The journal's mode is told, and not changed by looking."""
    path = Path(str(make_url(url).database))
    assert find(sqlite_file.examine)["database journal"].status == "ok"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    for _ in range(2):
        assert find(database.examine)["migrations"].status == "ok"
        assert find(sqlite_file.examine)["database journal"].status == "warn"


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_file_for_everybody(url: str, find: Find) -> None:
    """Unless its folder lets nobody in."""
    path = Path(str(make_url(url).database))
    path.parent.chmod(0o755)
    path.chmod(0o644)
    finding = find(sqlite_file.examine)["database file"]
    assert (finding.status, finding.remedy) == ("warn", f"chmod 600 {path}*")
    for private, mode in ((path.parent, 0o700), (path, 0o600)):
        before = private.stat().st_mode
        private.chmod(mode)
        assert find(sqlite_file.examine)["database file"].status == "ok"
        private.chmod(before)


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
@pytest.mark.parametrize(("kind", "status"), [("ext4", "ok"), ("nfs4", "fail"), ("fuse.sshfs", "fail")])
def test_file_systems(url: str, find: Find, monkeypatch: pytest.MonkeyPatch, kind: str, status: str) -> None:
    """The mount that is nearest counts. Network file systems cannot be mounted here, so the list of mounts is made up."""
    folder = Path(str(make_url(url).database)).parent.resolve()
    mounts = [SimpleNamespace(mountpoint="/", fstype="overlay"), SimpleNamespace(mountpoint=str(folder), fstype=kind)]
    monkeypatch.setattr("psutil.disk_partitions", lambda **_all: mounts)
    assert find(sqlite_file.examine)["database file system"].status == status


def _column(url: str, query: str) -> list[Any]:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        return list(connection.exec_driver_sql(query).scalars())
