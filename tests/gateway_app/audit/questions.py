"""The queries of docs/audit-queries.md, as the page has them: what tests and the benchmark run is what people read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.ids import lower_bound

PAGE = Path(__file__).parents[3] / "docs" / "audit-queries.md"
_BLOCK = re.compile(r"^```sql ([\w-]+)(?: (sqlite|postgresql))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Blocks that explain how to ask, and are no questions.
_TOOLS = ("id", "role")


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `queries` holds its SQL by SQLAlchemy's name of the database."""

    name: str
    queries: Mapping[str, str]

    def ask(self, connection: Connection, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the answer's rows. Of `parameters` the query takes those that it names."""
        return [dict(row) for row in self._run(connection, "", parameters).mappings()]

    def plan(self, connection: Connection, parameters: Mapping[str, Any]) -> str:
        """Return how the database goes about it."""
        explain = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN "
        return "\n".join(str(row[-1]) for row in self._run(connection, explain, parameters))

    def _run(self, connection: Connection, before: str, parameters: Mapping[str, Any]) -> sa.CursorResult[Any]:
        statement = sa.text(before + self.queries[connection.dialect.name])
        return connection.execute(statement, {name: parameters[name] for name in statement.compile().params})


def blocks(page: str | None = None) -> dict[str, dict[str, str]]:
    """Return every SQL block of the page by its name and its database; one without a database is for both."""
    found: dict[str, dict[str, str]] = {}
    for name, database, query in _BLOCK.findall(page or PAGE.read_text("utf-8")):
        for kind in [database] if database else ["sqlite", "postgresql"]:
            if found.setdefault(name, {}).setdefault(kind, query) is not query:
                raise ValueError(f"two blocks of SQL are called {name}")
    return found


def questions() -> dict[str, Question]:
    """Return the page's questions by name, in its order."""
    return {name: Question(name, queries) for name, queries in blocks().items() if name not in _TOOLS}


def period(since: datetime, until: datetime) -> dict[str, Any]:
    """Return the parameters that say a period: as text in UTC, which both databases take, and as ids."""
    ends = {"since": since, "until": until}
    moments = {name: f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}" for name, moment in ends.items()}
    return moments | {f"{name}_id": lower_bound(moment) for name, moment in ends.items()}
