"""Files in SQL: sealed, in chunks, invisible until they are whole, and gone when they are deleted."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import sqlalchemy as sa

from gateway_app.batches import files as module
from gateway_app.batches.batches import Batches
from gateway_app.batches.claims import take
from gateway_app.batches.files import ABANDONED_AFTER, CHUNK_BYTES, Files
from gateway_app.governance.api_keys import Caller
from tasks.crypto import DecryptionFailed
from tasks.db import Database, now
from tasks.errors import FileInUse, NotFound
from tasks.schema_batches import file_chunks
from tasks.schema_batches import files as files_table
from tests.gateway_app.batches.fakes import URL, jsonl, line, store

CANARY = b"canary-4f1e-in-a-file"


def counts(database: Database) -> tuple[int, int]:
    """Return how many files and chunks there are."""

    def count(table: sa.Table) -> int:
        query = sa.select(sa.func.count()).select_from(table)
        return int(database.read(lambda connection: connection.execute(query).scalar_one()))

    return count(files_table), count(file_chunks)


def content(files: Files, file_id: str) -> bytes:
    """Return what is in a file."""
    return b"".join(files.read(files.find(file_id, "default")))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 17])
def test_round_trip(files: Files, database: Database, caller: Caller, size: int) -> None:
    """What was written in pieces of any size is read again, from any place."""
    data = os.urandom(size)
    writer = files.open(caller, "näme.jsonl")
    for start in range(0, size, 100_003):
        writer.write(data[start : start + 100_003])
    writer.flush()
    with pytest.raises(NotFound):
        files.find(writer.file_id, "default")
    database.write(lambda connection: writer.finish(connection, "batch", None))
    file = files.find(writer.file_id, "default")
    assert (file.size, file.filename, file.purpose, file.expires_at) == (size, "näme.jsonl", "batch", None)
    for offset in {0, size // 2, max(0, size - 1), size}:
        assert b"".join(files.read(file, offset)) == data[offset:]


def test_nothing_lies_open(files: Files, database: Database, caller: Caller) -> None:
    """Neither content nor name is stored as it is; a chunk opens in its own place only."""
    file_id = store(files, database, caller, CANARY + b"x" * CHUNK_BYTES)
    rows = database.read(lambda connection: list(connection.execute(sa.select(file_chunks.c.sealed)).scalars()))
    names = database.read(lambda connection: list(connection.execute(sa.select(files_table.c.filename)).scalars()))
    assert not any(CANARY in bytes(row) for row in rows)
    assert b"input" not in bytes(names[0])
    swap = sa.update(file_chunks).values(number=1 - file_chunks.c.number + 2)
    database.write(lambda connection: connection.execute(swap) and None)
    with pytest.raises((DecryptionFailed, NotFound)):
        content(files, file_id)


def test_deleting(files: Files, database: Database, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone at once, key first; its rows follow when it is swept, some at a time."""
    monkeypatch.setattr(module, "_SWEEP_CHUNKS", 2)
    kept = store(files, database, caller, b"kept")
    file_id = store(files, database, caller, b"x" * (5 * CHUNK_BYTES))
    file = files.find(file_id, "default")
    for organization, name in (("other", file_id), ("default", "file-" + "0" * 32), ("default", "nonsense\x00")):
        with pytest.raises(NotFound):
            files.delete(name, organization)
    files.delete(file_id, "default")
    for _ in range(2):
        with pytest.raises(NotFound):
            files.find(file_id, "default")
        with pytest.raises(NotFound):
            files.delete(file_id, "default")
    query = sa.select(files_table.c.data_key).where(files_table.c.file_id == file_id)
    assert database.read(lambda connection: connection.execute(query).scalar()) is None
    assert counts(database) == (2, 6)
    files.sweep()
    assert counts(database) == (1, 1)
    with pytest.raises(NotFound):
        list(files.read(file))
    assert content(files, kept) == b"kept"


def test_a_file_that_a_batch_reads(files: Files, database: Database, batches: Batches, caller: Caller) -> None:
    """It is neither deleted nor swept before the batch has ended, and swept after."""
    file_id = store(files, database, caller, jsonl(line("a")))
    batches.create(caller, URL, file_id)
    with pytest.raises(FileInUse):
        files.delete(file_id, "default")
    past = sa.update(files_table).values(expires_at=now() - timedelta(seconds=1))
    database.write(lambda connection: connection.execute(past) and None)
    files.sweep()
    with pytest.raises(NotFound):
        files.find(file_id, "default")
    assert files.find(file_id, "default", even_expired=True).size > 0
    claim = take(database, "test", 30)
    assert claim is not None
    claim.fail([])
    files.sweep()
    assert counts(database) == (0, 0)


def test_an_upload_that_never_ends(files: Files, database: Database, caller: Caller) -> None:
    """It is swept after a day, and then cannot be finished; a younger one is left alone."""
    writer = files.open(caller, "a")
    writer.write(b"x" * CHUNK_BYTES)
    files.sweep()
    writer.write(b"x" * CHUNK_BYTES)
    old = sa.update(files_table).values(created_at=now() - ABANDONED_AFTER)
    database.write(lambda connection: connection.execute(old) and None)
    files.sweep()
    assert counts(database) == (0, 0)
    with pytest.raises(NotFound):
        writer.write(b"x" * CHUNK_BYTES)
    with pytest.raises(NotFound):
        database.write(lambda connection: writer.finish(connection, "batch", None))
    writer.abandon()


def test_pages(files: Files, database: Database, caller: Caller) -> None:
    """In both orders, from any place, of one purpose, and of one organization."""
    ids = [store(files, database, caller, b"x") for _ in range(5)]
    store(files, database, Caller("k", "other"), b"x")
    listed = [file.file_id for file in files.page("default", None, None, 10, ascending=True)]
    assert listed == ids
    assert [file.file_id for file in files.page("default", "batch", ids[3], 2, ascending=False)] == [ids[2], ids[1]]
    assert [file.file_id for file in files.page("default", None, ids[3], 2, ascending=True)] == [ids[4]]
    assert files.page("default", "batch_output", None, 10, ascending=True) == []
