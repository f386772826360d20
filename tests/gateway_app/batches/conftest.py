"""A migrated database, on each kind of it, and a gateway of fakes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy.engine import Row

from gateway_app.batches.batches import Batches
from gateway_app.batches.files import Files
from gateway_app.governance.api_keys import ApiKeys, Caller
from tasks.crypto import KEY_BYTES, KeyWrapper
from tasks.db import Database
from tasks.settings import DatabaseGroup
from tests.gateway_app.batches.driving import Create
from tests.gateway_app.batches.fakes import URL, FakeGateway, jsonl, store


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """Return the migrated database."""
    database = Database(DatabaseGroup(url=migrated_url))
    yield database
    database.close()


@pytest.fixture
def keys() -> KeyWrapper:
    """Return a master key."""
    return KeyWrapper((os.urandom(KEY_BYTES),))


@pytest.fixture
def files(database: Database, keys: KeyWrapper) -> Files:
    """Return the file storage."""
    return Files(database, keys)


@pytest.fixture
def batches(database: Database, keys: KeyWrapper) -> Batches:
    """Return the batches."""
    return Batches(database, keys)


@pytest.fixture
def caller(database: Database) -> Caller:
    """Return a client with a key."""
    key_id, _ = ApiKeys(database, (b"pepper",)).create("default", "test")
    return Caller(key_id, "default")


@pytest.fixture
def gateway(database: Database, keys: KeyWrapper) -> FakeGateway:
    """Return a gateway that runs nothing by itself."""
    return FakeGateway(database, keys)


@pytest.fixture
def create(database: Database, files: Files, batches: Batches, caller: Caller) -> Create:
    """Return a function that makes a batch over the given lines."""

    def make(*lines: Any, **options: Any) -> Row[Any]:
        return batches.create(caller, URL, store(files, database, caller, jsonl(*lines)), **options)

    return make
