"""Column types that mean the same on both databases, and how constraints list names."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import JSON, DateTime, String, TypeDecorator
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect


def quoted(names: tuple[str, ...]) -> str:
    """Return `names` as an SQL list of string literals."""
    return ", ".join(f"'{name}'" for name in names)


class UtcDateTime(TypeDecorator[datetime]):
    """An instant in UTC; SQLite keeps it as sortable text without offset."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC. A naive value is an error: it would be read as local time."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone cannot be stored")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002  as SQLAlchemy calls it
        """Return the instant with its zone."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Document = JSON().with_variant(JSONB(), "postgresql")

#: Byte-wise collation: it keeps UUIDv7 in time order, and range partitions need an order that no locale changes.
RequestId = String(35).with_variant(String(35, collation="C"), "postgresql")
