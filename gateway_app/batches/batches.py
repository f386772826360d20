"""Batches as their owners see them.

    validating ──▶ in_progress ──▶ finalizing ──▶ completed | expired
        │  └──▶ failed   │
        └────────────────┴──▶ cancelling ──▶ cancelled

A client makes a batch and may cancel it; every other step is a driver's (see `claims` and `driver`). The row keeps the
organization and the key that made it, in whose name each of its requests is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from pydantic_core import from_json, to_json
from sqlalchemy.engine import Connection, Row

from gateway_app.batches.ids import BATCH, FILE, is_id, new_id
from gateway_app.governance.api_keys import Caller
from tasks.crypto import KeyWrapper, seal, unseal
from tasks.db import Database, now
from tasks.errors import AlreadyFinished, InvalidRequest, NotFound
from tasks.schema_batches import batches, files

COMPLETION_WINDOW = timedelta(hours=24)


class Batches:
    """The batches of all organizations."""

    def __init__(self, database: Database, keys: KeyWrapper, window: timedelta = COMPLETION_WINDOW) -> None:
        self._database = database
        self._keys = keys
        self._window = window

    def create(
        self,
        caller: Caller,
        endpoint: str,
        input_file_id: str,
        metadata: Mapping[str, str] | None = None,
        output_seconds: int | None = None,
    ) -> Row[Any]:
        """Begin a batch over an uploaded file and return its row.

        Raises NotFound if the caller has no such file, InvalidRequest if it is not of purpose batch.
        """
        if not is_id(input_file_id, FILE):
            raise NotFound("there is no such file")
        batch_id, at = new_id(BATCH), now()
        key, wrapped_key = self._keys.new_key(batch_id)
        row = {
            "batch_id": batch_id,
            "organization": caller.organization,
            "api_key_id": caller.key_id,
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "status": "validating",
            "created_at": at,
            "expires_at": at + self._window,
            "total": 0,
            "completed": 0,
            "failed": 0,
            "output_seconds": output_seconds,
            "data_key": wrapped_key,
            "client_metadata": None if metadata is None else seal(key, to_json(metadata), f"metadata:{batch_id}"),
            "claim": 0,
        }
        usable = sa.and_(
            files.c.file_id == input_file_id,
            files.c.organization == caller.organization,
            files.c.status == "processed",
            sa.or_(files.c.expires_at.is_(None), files.c.expires_at > at),
        )

        def work(connection: Connection) -> Row[Any]:
            # Locked until the batch is there, so that the file cannot be deleted in between.
            purpose = connection.execute(sa.select(files.c.purpose).where(usable).with_for_update(read=True)).scalar()
            if purpose is None:
                raise NotFound("there is no such file")
            if purpose != "batch":
                problem = {"field": "input_file_id", "message": "must be a file of purpose batch"}
                raise InvalidRequest("input_file_id must name a file of purpose batch", errors=[problem])
            return connection.execute(sa.insert(batches).values(row).returning(batches)).one()

        return self._database.write(work)

    def find(self, batch_id: str, organization: str) -> Row[Any]:
        """Return a batch's row. Raises NotFound for an unknown one and for another organization's alike."""
        row = None
        if is_id(batch_id, BATCH):
            row = self._database.read(lambda connection: _find(connection, batch_id, organization))
        if row is None:
            raise NotFound("there is no such batch")
        return row

    def page(self, organization: str, after: str | None, limit: int) -> list[Row[Any]]:
        """Return up to `limit` batches, the newest first, older than `after` if that is given."""
        query = sa.select(batches).where(batches.c.organization == organization)
        if after is not None:
            query = query.where(batches.c.batch_id < after)
        query = query.order_by(batches.c.batch_id.desc()).limit(limit)
        return self._database.read(lambda connection: list(connection.execute(query)))

    def cancel(self, batch_id: str, organization: str) -> Row[Any]:
        """Have a batch end early and return its row; cancelling again is no error.

        Raises NotFound, or AlreadyFinished for one that is through.
        """
        mine = (batches.c.batch_id == batch_id, batches.c.organization == organization)
        running = batches.c.status.in_(("validating", "in_progress"))

        def work(connection: Connection) -> Row[Any] | None:
            values = {"status": "cancelling", "cancelling_at": now()}
            connection.execute(sa.update(batches).where(*mine, running).values(values))
            return _find(connection, batch_id, organization)

        row = self._database.write(work) if is_id(batch_id, BATCH) else None
        if row is None:
            raise NotFound("there is no such batch")
        if row.status not in ("cancelling", "cancelled"):
            raise AlreadyFinished(f"the batch is already {row.status}")
        return row

    def metadata(self, row: Row[Any]) -> dict[str, str] | None:
        """Return what the client attached to its batch."""
        if row.client_metadata is None:
            return None
        key = self._keys.unwrap(row.data_key, row.batch_id)
        attached: dict[str, str] = from_json(unseal(key, row.client_metadata, f"metadata:{row.batch_id}"))
        return attached


def _find(connection: Connection, batch_id: str, organization: str) -> Row[Any] | None:
    mine = (batches.c.batch_id == batch_id, batches.c.organization == organization)
    return connection.execute(sa.select(batches).where(*mine)).one_or_none()
