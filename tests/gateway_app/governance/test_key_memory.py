"""Whose a key is, is remembered for a moment; a key that was revoked is refused soon, and here at once."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from gateway_app.governance import api_keys as module
from gateway_app.governance.api_keys import CACHE_S, ApiKeys, Caller
from tasks.db import Database
from tasks.errors import Unauthenticated
from tasks.settings import DatabaseGroup

PEPPERS = (b"new pepper", b"old pepper")


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """Return an empty database."""
    database = Database(DatabaseGroup(url=migrated_url))
    yield database
    database.close()


def test_a_key_that_is_revoked_elsewhere(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for as long as it is remembered, and not a moment longer."""
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    here, elsewhere = ApiKeys(database, PEPPERS), ApiKeys(database, PEPPERS)
    key_id, key = elsewhere.create("acme", "test")
    assert here.authenticate(f"Bearer {key}") == Caller(key_id, "acme")
    assert elsewhere.revoke(key_id)
    clock.now_s += CACHE_S / 2
    assert here.authenticate(f"Bearer {key}") == Caller(key_id, "acme")
    clock.now_s += CACHE_S / 2
    with pytest.raises(Unauthenticated):
        here.authenticate(f"Bearer {key}")


def test_a_key_that_is_revoked_here(database: Database) -> None:
    """It is refused at once; and one that is unknown is not remembered as such."""
    keys = ApiKeys(database, PEPPERS)
    key_id, key = keys.create("acme", "test")
    keys.authenticate(f"Bearer {key}")
    assert keys.revoke(key_id)
    with pytest.raises(Unauthenticated):
        keys.authenticate(f"Bearer {key}")


def test_a_key_made_under_an_older_pepper(database: Database) -> None:
    """It is remembered like any other."""
    key_id, key = ApiKeys(database, PEPPERS[1:]).create("acme", "test", "admin")
    keys = ApiKeys(database, PEPPERS)
    for _ in range(2):
        assert keys.authenticate(f"Bearer {key}") == Caller(key_id, "acme", "admin")
