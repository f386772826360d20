"""The answers that docs/audit-queries.md shows, from the record that the tests ask.

Run as a module it writes them into the page: `python -m tests.gateway_app.audit.shown`.
"""

from __future__ import annotations

import re
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.migrating import upgrade
from tasks.schema import audit_events
from tests.gateway_app.audit.counting import Rows
from tests.gateway_app.audit.questions import PAGE, period, questions
from tests.gateway_app.audit.recorded import SINCE, UNTIL, WORKERS, fill
from tests.gateway_app.audit.recorded_changes import KEYS

SHOWN_ROWS = 5


def parameters(connection: Connection, since: datetime = SINCE, until: datetime = UNTIL) -> dict[str, Any]:
    """Return a value for each parameter: of acme, its busiest key, and a request that lost a worker."""
    retried = sa.select(sa.func.min(audit_events.c.request_id)).where(
        audit_events.c.kind == "completed", audit_events.c.attempt == 2, audit_events.c.organization == "acme"
    )
    return {
        **period(since, until),
        "organization": "acme",
        "key_id": next(iter(KEYS)),
        "worker": WORKERS[0],
        "policy_version": 1,
        "limit": 20,
        "request_id": connection.execute(retried).scalar_one(),
    }


def with_answers(page: str, connection: Connection) -> str:
    """Return the page with the answers that the record gives."""
    given = parameters(connection)
    shown = {name: table(question.ask(connection, given)) for name, question in questions().items()}
    return re.sub(
        r"^```text ([\w-]+)\n.*?^```$",
        lambda block: f"```text {block[1]}\n{shown[block[1]]}```",
        page,
        flags=re.DOTALL | re.MULTILINE,
    )


def table(rows: Rows) -> str:
    """Return the first rows of an answer as text in columns."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows[:SHOWN_ROWS])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if len(rows) > SHOWN_ROWS:
        lines.append(f"… {len(rows) - SHOWN_ROWS} more")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    # To the second is enough for a reader.
    with suppress(ValueError):
        return f"{datetime.strptime(text, '%Y-%m-%d %H:%M:%S.%f'):%Y-%m-%d %H:%M:%S}"  # noqa: DTZ007
    return text


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'gateway.db'}"
        upgrade(url)
        fill(url)
        engine = sa.create_engine(url)
        with engine.connect() as connection:
            page = with_answers(PAGE.read_text("utf-8"), connection)
        engine.dispose()
        PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
