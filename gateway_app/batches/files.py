"""Files of any size in SQL, sealed, and never whole in memory.

A file is cut into chunks of `CHUNK_BYTES`; each is sealed with the file's own key, bound to its file and number, and
committed alone, so that writing and reading take the memory of one chunk. Until its last chunk is committed a file is
`uploading` and nobody sees it. Deleting destroys the wrapped key, which erases the content at once; the rows, useless
from then on, are removed little by little by `sweep`, which also deletes what expired and what was never finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from gateway_app.batches.ids import FILE, is_id, new_id
from gateway_app.governance.api_keys import Caller
from tasks.crypto import KeyWrapper, seal, unseal
from tasks.db import Database, now
from tasks.errors import FileInUse, NotFound
from tasks.schema_batches import OPEN_STATUSES, batches, file_chunks, files

T = TypeVar("T")
CHUNK_BYTES = 256 * 1024
#: An upload without an end after this long has lost its client or its gateway.
ABANDONED_AFTER = timedelta(days=1)
#: Chunks removed in one transaction: more would keep other writers waiting.
_SWEEP_CHUNKS = 64


class Write(Protocol):
    """Runs a function of a connection in a transaction and returns once it is committed."""

    def __call__(self, work: Callable[[Connection], T], /) -> T:
        """Return what `work` returned."""
        ...


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A finished file. `size` is in bytes; `key` opens its chunks."""

    file_id: str
    purpose: str
    filename: str
    size: int
    created_at: datetime
    expires_at: datetime | None
    key: bytes = field(repr=False)


class FileWriter:
    """One file being written. Give it bytes, `flush` it, then `finish` it in a transaction; or `abandon` it."""

    def __init__(self, file_id: str, key: bytes, write: Write) -> None:
        self.file_id = file_id
        self._key = key
        self._write = write
        self._buffer = bytearray()
        self._chunks = 0

    def write(self, data: bytes) -> None:
        """Add `data`, storing each chunk that is full. Raises NotFound if the file was deleted meanwhile."""
        self._buffer += data
        while len(self._buffer) >= CHUNK_BYTES:
            self._store(bytes(self._buffer[:CHUNK_BYTES]))
            del self._buffer[:CHUNK_BYTES]

    def flush(self) -> None:
        """Store the last chunk."""
        if self._buffer:
            self._store(bytes(self._buffer))
            self._buffer.clear()

    def finish(self, connection: Connection, purpose: str, lifetime: timedelta | None) -> None:
        """Make the flushed file visible, for `lifetime` from its creation or for good."""
        mine = (files.c.file_id == self.file_id, files.c.status == "uploading")
        created_at = connection.execute(sa.select(files.c.created_at).where(*mine)).scalar()
        if created_at is None:
            raise NotFound("the file was deleted while it was written")
        expires_at = created_at + lifetime if lifetime else None
        values = {"status": "processed", "purpose": purpose, "expires_at": expires_at}
        connection.execute(sa.update(files).where(*mine).values(values))

    def abandon(self) -> None:
        """Delete what was written."""
        mine = sa.and_(files.c.file_id == self.file_id, files.c.status == "uploading")
        self._write(lambda connection: _destroy(connection, mine))

    def _store(self, plain: bytes) -> None:
        number = self._chunks
        row = {"file_id": self.file_id, "number": number, "sealed": seal(self._key, plain, _context(self, number))}

        def work(connection: Connection) -> None:
            mine = sa.update(files).where(files.c.file_id == self.file_id, files.c.status == "uploading")
            if connection.execute(mine.values(bytes=files.c.bytes + len(plain))).rowcount != 1:
                raise NotFound("the file was deleted while it was written")
            connection.execute(sa.insert(file_chunks), row)

        self._write(work)
        self._chunks += 1


class Files:
    """The files of all organizations."""

    def __init__(self, database: Database, keys: KeyWrapper) -> None:
        self._database = database
        self._keys = keys

    def open(self, caller: Caller, filename: str, write: Write | None = None) -> FileWriter:
        """Begin a file of the caller's. `write` runs its transactions; the database's own is the default."""
        write = write or self._database.write
        file_id = new_id(FILE)
        key, wrapped_key = self._keys.new_key(file_id)
        row = {
            "file_id": file_id,
            "organization": caller.organization,
            "api_key_id": caller.key_id,
            "purpose": "",
            "status": "uploading",
            "bytes": 0,
            "created_at": now(),
            "data_key": wrapped_key,
            "filename": seal(key, filename.encode(), f"filename:{file_id}"),
        }
        write(lambda connection: connection.execute(sa.insert(files), row) and None)
        return FileWriter(file_id, key, write)

    def find(self, file_id: str, organization: str, *, even_expired: bool = False) -> StoredFile:
        """Return a file. Raises NotFound for an unknown, expired or deleted one and for another organization's.

        `even_expired` is for a batch that began to read in time.
        """
        visible = _visible(organization)[: -1 if even_expired else None]
        query = sa.select(files).where(files.c.file_id == file_id, *visible)
        row = self._database.read(lambda on: on.execute(query).one_or_none()) if is_id(file_id, FILE) else None
        if row is None:
            raise NotFound("there is no such file")
        return self._stored(row)

    def page(
        self, organization: str, purpose: str | None, after: str | None, limit: int, *, ascending: bool
    ) -> list[StoredFile]:
        """Return up to `limit` files in the order of their ids, beyond the id `after` if that is given."""
        query = sa.select(files).where(*_visible(organization))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        if after is not None:
            query = query.where(files.c.file_id > after if ascending else files.c.file_id < after)
        query = query.order_by(files.c.file_id if ascending else files.c.file_id.desc()).limit(limit)
        rows = self._database.read(lambda connection: list(connection.execute(query)))
        return [self._stored(row) for row in rows]

    def read(self, file: StoredFile, offset: int = 0) -> Iterator[bytes]:
        """Return the content from byte `offset` on, a chunk at a time. Raises NotFound if it is deleted meanwhile."""
        for number in range(offset // CHUNK_BYTES, -(-file.size // CHUNK_BYTES)):
            yield self.chunk(file, number)[max(0, offset - number * CHUNK_BYTES) :]

    def chunk(self, file: StoredFile, number: int) -> bytes:
        """Return one chunk's bytes. Raises NotFound if the file was deleted."""
        query = sa.select(file_chunks.c.sealed)
        query = query.where(file_chunks.c.file_id == file.file_id, file_chunks.c.number == number)
        sealed = self._database.read(lambda connection: connection.execute(query).scalar())
        if sealed is None:
            raise NotFound("the file was deleted while it was read")
        return unseal(file.key, sealed, _context(file, number))

    def delete(self, file_id: str, organization: str) -> None:
        """Erase a file. Raises NotFound, or FileInUse while a batch reads from it."""
        if not is_id(file_id, FILE):
            raise NotFound("there is no such file")

        def work(connection: Connection) -> None:
            query = sa.select(files.c.file_id).where(files.c.file_id == file_id, *_visible(organization))
            # Locked first: a batch that is being created on it either is seen below, or finds the file gone.
            if connection.execute(query.with_for_update()).one_or_none() is None:
                raise NotFound("there is no such file")
            if connection.execute(sa.select(_is_read(file_id))).scalar():
                raise FileInUse
            _destroy(connection, files.c.file_id == file_id)

        self._database.write(work)

    def sweep(self) -> None:
        """Delete what expired or was abandoned, and remove the rows of what is deleted."""
        at = now()
        lost = sa.or_(
            sa.and_(files.c.status == "processed", files.c.expires_at <= at, ~_is_read(files.c.file_id)),
            sa.and_(files.c.status == "uploading", files.c.created_at <= at - ABANDONED_AFTER),
        )
        # Asked first: on SQLite every write transaction keeps all other writers out.
        query = sa.select(files.c.file_id)
        if self._database.read(lambda connection: connection.execute(query.where(lost).limit(1)).first()):
            self._database.write(lambda connection: _destroy(connection, lost))
        deleted = query.where(files.c.status == "deleted")
        for file_id in self._database.read(lambda connection: list(connection.execute(deleted).scalars())):
            while not self._database.write(lambda connection, file_id=file_id: _remove_some(connection, file_id)):  # type: ignore[misc]
                pass

    def _stored(self, row: Row[Any]) -> StoredFile:
        key = self._keys.unwrap(row.data_key, row.file_id)
        filename = unseal(key, row.filename, f"filename:{row.file_id}").decode()
        return StoredFile(row.file_id, row.purpose, filename, row.bytes, row.created_at, row.expires_at, key)


def _context(file: StoredFile | FileWriter, number: int) -> str:
    return f"file:{file.file_id}:{number}"


def _visible(organization: str) -> tuple[sa.ColumnElement[bool], ...]:
    expired = sa.and_(files.c.expires_at.is_not(None), files.c.expires_at <= now())
    return (files.c.organization == organization, files.c.status == "processed", ~expired)


def _is_read(file_id: str | sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    return sa.exists().where(batches.c.input_file_id == file_id, batches.c.status.in_(OPEN_STATUSES))


def _destroy(connection: Connection, condition: sa.ColumnElement[bool]) -> None:
    connection.execute(sa.update(files).where(condition).values(status="deleted", data_key=None))


def _remove_some(connection: Connection, file_id: str) -> bool:
    """Remove some rows of a deleted file; return whether that was all."""
    mine = file_chunks.c.file_id == file_id
    first = connection.execute(sa.select(sa.func.min(file_chunks.c.number)).where(mine)).scalar()
    if first is None:
        connection.execute(sa.delete(files).where(files.c.file_id == file_id, files.c.status == "deleted"))
        return True
    connection.execute(sa.delete(file_chunks).where(mine, file_chunks.c.number < first + _SWEEP_CHUNKS))
    return False
