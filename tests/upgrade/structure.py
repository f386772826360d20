"""What a database is to the code that uses it, and what of it a migration may not change while that code still runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection


@dataclass(frozen=True, slots=True)
class Column:
    """One column; `filled` tells whether a row may leave it out."""

    type: str
    nullable: bool
    filled: bool


@dataclass(frozen=True, slots=True)
class Table:
    """One table or view, and everything that may refuse a row."""

    columns: dict[str, Column]
    key: tuple[str, ...]
    unique: frozenset[str]
    checks: dict[str, str]
    foreign: frozenset[str]
    triggers: frozenset[str]


Structure = dict[str, Table]
PARTITION = re.compile(r"(requests|audit_events)_(\d{4}_\d\d|rest)")
_TRIGGERS = {
    "sqlite": "SELECT tbl_name, name || ': ' || sql FROM sqlite_master WHERE type = 'trigger'",
    "postgresql": "SELECT tgrelid::regclass::text, tgname || ': ' || pg_get_triggerdef(oid) FROM pg_trigger"
    " WHERE NOT tgisinternal",
}


def structure(connection: Connection) -> Structure:
    """Return all tables and views, but for Alembic's own, and for partitions, which are as their tables are."""
    inspector = sa.inspect(connection)
    triggers = [tuple(row) for row in connection.exec_driver_sql(_TRIGGERS[connection.dialect.name])]
    views = set(inspector.get_view_names())
    names = {name for name in (*inspector.get_table_names(), *views) if not PARTITION.fullmatch(name)}
    names.discard("alembic_version")
    found = {}
    for name in names:
        columns = {
            column["name"]: Column(str(column["type"]), column["nullable"], column.get("default") is not None)
            for column in inspector.get_columns(name)
        }
        view = name in views
        found[name] = Table(
            columns=columns,
            key=() if view else tuple(inspector.get_pk_constraint(name)["constrained_columns"]),
            unique=frozenset() if view else frozenset(_unique(connection, name)),
            checks={} if view else {str(c["name"]): c["sqltext"] for c in inspector.get_check_constraints(name)},
            foreign=frozenset(str(key) for key in inspector.get_foreign_keys(name)) if not view else frozenset(),
            triggers=frozenset(text for table, text in triggers if table == name),
        )
    return found


def _unique(connection: Connection, table: str) -> Iterator[str]:
    inspector = sa.inspect(connection)
    for index in inspector.get_indexes(table):
        if index["unique"]:
            conditions = {name: str(value) for name, value in (index.get("dialect_options") or {}).items()}
            yield f"{index['column_names']} {conditions}"
    for constraint in inspector.get_unique_constraints(table):
        yield str(constraint["column_names"])


def breaks(before: Structure, after: Structure) -> list[str]:
    """Return what code that knows only `before` may stumble over in `after`."""
    found = [f"{name} is gone" for name in before.keys() - after.keys()]
    for name in before.keys() & after.keys():
        found += (f"{name}: {problem}" for problem in _breaks(before[name], after[name]))
    return sorted(found)


def _breaks(before: Table, after: Table) -> Iterator[str]:
    for name, column in before.columns.items():
        now = after.columns.get(name)
        if now is None:
            yield f"column {name} is gone"
        elif now != column:
            yield f"column {name} was {column}, and is {now}"
    for name in after.columns.keys() - before.columns.keys():
        if not after.columns[name].nullable and not after.columns[name].filled:
            yield f"column {name} must be filled in, and the code before does not know it"
    for what in ("key", "checks", "foreign", "triggers", "unique"):
        was, now = getattr(before, what), getattr(after, what)
        # What refused a row and does no more is no harm to those who never wrote such a row, but the key names a row.
        if now != was and (what == "key" or set(now) - set(was) or isinstance(was, dict)):
            yield f"{what} were {was}, and are {now}"
