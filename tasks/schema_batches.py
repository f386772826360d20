"""The tables of files and batches; they share `tasks.schema`'s metadata.

A file's content is rows of sealed chunks, and all that a client wrote (content, names, metadata, errors that may quote
a field) is sealed with a key of its file or batch: destroying that one key erases it. A batch's lines are rows too, so
that whoever drives the batch next knows of each line what became of it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Integer, LargeBinary, String, Table

from tasks.schema import metadata
from tasks.schema_types import Document, UtcDateTime, quoted

FILE_STATUSES = ("uploading", "processed", "deleted")
BATCH_STATUSES = (
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
)
#: A batch in one of these still needs a driver.
OPEN_STATUSES = ("validating", "in_progress", "finalizing", "cancelling")
#: A line is `pending` until it gets a request id, `taken` from then on, and one of the others once that has ended.
ITEM_STATES = ("pending", "taken", "completed", "failed", "cancelled", "expired")


def _id(name: str, length: int = 40, **options: Any) -> Column[Any]:
    # Byte-wise collation: it keeps the UUIDv7 inside in time order, which is the order of lists.
    return Column(name, String(length).with_variant(String(length, collation="C"), "postgresql"), **options)


files = Table(
    "files",
    metadata,
    _id("file_id", primary_key=True),
    Column("organization", String(200), nullable=False),
    Column("api_key_id", String(40), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("status", String(16), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("data_key", LargeBinary),
    Column("filename", LargeBinary, nullable=False),
    CheckConstraint(f"status IN ({quoted(FILE_STATUSES)})", name="files_status"),
    Index("files_by_organization", "organization", "file_id"),
)

file_chunks = Table(
    "file_chunks",
    metadata,
    _id("file_id", primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("sealed", LargeBinary, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    _id("batch_id", primary_key=True),
    Column("organization", String(200), nullable=False),
    Column("api_key_id", String(40), nullable=False),
    Column("endpoint", String(40), nullable=False),
    _id("input_file_id", nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("in_progress_at", UtcDateTime),
    Column("finalizing_at", UtcDateTime),
    Column("cancelling_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("errors", Document),
    Column("usage", Document),
    _id("output_file_id"),
    _id("error_file_id"),
    Column("output_seconds", Integer),
    Column("data_key", LargeBinary, nullable=False),
    Column("client_metadata", LargeBinary),
    Column("claim", Integer, nullable=False),
    Column("claimed_by", String(200)),
    Column("claimed_until", UtcDateTime),
    CheckConstraint(f"status IN ({quoted(BATCH_STATUSES)})", name="batches_status"),
    Index("batches_by_organization", "organization", "batch_id"),
    Index("batches_by_status", "status"),
)

batch_items = Table(
    "batch_items",
    metadata,
    _id("batch_id", primary_key=True),
    Column("line_number", Integer, primary_key=True),
    Column("custom_id", String(512), nullable=False),
    Column("byte_offset", BigInteger, nullable=False),
    Column("byte_length", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    _id("request_id", 35),
    Column("error_code", String(64)),
    Column("error", LargeBinary),
    CheckConstraint(f"state IN ({quoted(ITEM_STATES)})", name="batch_items_state"),
    Index("batch_items_by_custom_id", "batch_id", "custom_id", unique=True),
)
