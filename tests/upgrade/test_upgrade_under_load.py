"""`flask db upgrade` on a database that is used: it holds up nobody who writes, and one upgrade runs at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection

from tasks.db_engine import create_engine
from tasks.errors import ConfigurationError
from tasks.migrating import LOCK_TIMEOUT_S, MIGRATIONS, pending_migrations, upgrade
from tasks.settings import DatabaseGroup
from tests.services import wait_until
from tests.upgrade import previous_release

SOON_S = 60.0
TRIES = 3
#: What env.py takes, so that one upgrade runs at a time.
LOCK = "SELECT pg_advisory_xact_lock(7355608)"


@pytest.fixture
def old_url(postgres_url: str) -> str:
    """Return the URL of a database with the tables of the release before, and a key."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = postgres_url
    command.upgrade(config, previous_release.newest_revision())
    return postgres_url


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """Connect as the product does."""
    engine = create_engine(DatabaseGroup(url=url))
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


class Upgrade(threading.Thread):
    """An upgrade under way; `said` is what it tells whoever waits for it."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.said: list[str] = []
        self._url = url
        self.start()

    def run(self) -> None:
        """Upgrade."""
        upgrade(self._url, self.said.append)


def waits(upgrading: Upgrade, why: str) -> Callable[[], bool]:
    """Return whether an upgrade has said why it waits."""
    return lambda: any(why in text for text in upgrading.said)


def test_a_table_that_is_read_for_long(old_url: str) -> None:
    """An export reads; the upgrade waits for its end, and whoever writes meanwhile waits less than its time-out."""
    write = sa.text("UPDATE requests SET worker = 'x' WHERE request_id = 'none'")
    with connected(old_url) as reading:
        reading.exec_driver_sql("SELECT count(*) FROM requests")
        upgrading = Upgrade(old_url)
        wait_until(waits(upgrading, "a table was in use"), SOON_S, "an upgrade that waits")
        slowest_s, writes = 0.0, 0
        # Through two more tries of the upgrade. A write that waits as long as a gateway does would raise.
        while len(upgrading.said) < TRIES:
            began = time.monotonic()
            with connected(old_url) as writing:
                writing.execute(write)
                writing.commit()
            slowest_s, writes = max(slowest_s, time.monotonic() - began), writes + 1
        assert upgrading.is_alive()
    upgrading.join(SOON_S)
    assert not upgrading.is_alive()
    print(f"the slowest of {writes} writes took {slowest_s:.1f} s")
    assert slowest_s >= LOCK_TIMEOUT_S / 2, "no write came while the upgrade waited: this test showed nothing of it"
    with connected(old_url) as connection:
        assert pending_migrations(connection) == []


def test_a_second_upgrade(old_url: str) -> None:
    """It waits for the first, and says so; without patience it gives up and changes nothing."""
    with connected(old_url) as first:
        first.exec_driver_sql(LOCK)
        upgrading = Upgrade(old_url)
        wait_until(waits(upgrading, "another upgrade is running"), SOON_S, "an upgrade that waits")
        with pytest.raises(ConfigurationError, match="another upgrade is running"):
            upgrade(old_url, patience_s=0)
        assert pending_migrations(first)
    upgrading.join(SOON_S)
    with connected(old_url) as connection:
        assert pending_migrations(connection) == []
