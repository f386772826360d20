"""A batch driven by hand: claimed, moved on step by step, and looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Row

from gateway_app.batches.claims import Claim, take
from gateway_app.batches.driver import drive
from gateway_app.batches.files import Files
from gateway_app.batches.ports import Services
from tasks.db import Database
from tasks.schema_batches import batches as batches_table
from tests.gateway_app.batches.fakes import FakeGateway

#: Makes a batch over the given lines.
Create = Callable[..., Row[Any]]
MAX_ROUNDS = 2000


def claimed(database: Database) -> Claim:
    """Return a claim on the one batch that needs a driver."""
    claim = take(database, "test", 30)
    assert claim is not None
    return claim


def run(services: Services, gateway: FakeGateway, work: Callable[[], object] | None = None) -> Row[Any]:
    """Drive the one batch to its end while workers work; return its row."""
    claim = claimed(services.database)
    for count, _ in enumerate(drive(services, claim)):
        assert count < MAX_ROUNDS
        (work or gateway.work)()
    return row_of(services.database, claim.batch_id)


def row_of(database: Database, batch_id: str) -> Row[Any]:
    """Return a batch as it is now."""
    query = sa.select(batches_table).where(batches_table.c.batch_id == batch_id)
    return database.read(lambda connection: connection.execute(query).one())


def lines_of(files: Files, file_id: str | None) -> list[dict[str, Any]]:
    """Return what a file of a batch says."""
    assert file_id is not None
    content = b"".join(files.read(files.find(file_id, "default")))
    return [json.loads(text) for text in content.splitlines()]
