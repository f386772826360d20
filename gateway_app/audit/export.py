"""The record as a file: MetaQore's trail as JSON lines, or a table as CSV.

Both come as chunks that each end with a whole line. A spreadsheet takes a cell that begins with one of a few characters
for a formula; such a cell of text begins with an apostrophe here, since agents and keys are named by whoever calls.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from gateway_app.audit import events
from gateway_app.audit.events import Selection
from gateway_app.audit.trail import COLUMNS, DETAILS, contract_event, line
from tasks.db import Database

Format = Literal["jsonl", "csv"]
MEDIA_TYPES: dict[Format, str] = {"jsonl": "application/x-ndjson", "csv": "text/csv"}
#: A veto's parts have columns of their own; of what else an event's details hold, what is no text or number is JSON.
_VETO = ("reason", "policy_violated", "severity", "details")
_JSON = (*(name for name in DETAILS if name != "veto"), "change", "details")
HEADER = ("timestamp", "event_type", "organization", *COLUMNS, *(f"veto.{name}" for name in _VETO), *_JSON)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def export(database: Database, selection: Selection, form: Format) -> Iterator[tuple[bytes, int]]:
    """Yield the selected events, the oldest first, as chunks of whole lines with the number of events in each.

    Raises DatabaseUnavailable, also in the middle; what was yielded before ends with a whole line.
    """
    if form == "csv":
        yield _csv([HEADER]), 0
    for rows in events.pages(database, selection):
        found = [contract_event(row) for row in rows]
        yield (_csv([_cells(event) for event in found]) if form == "csv" else b"".join(map(line, found))), len(found)


def _cells(event: Mapping[str, Any]) -> list[Any]:
    payload = event["payload"]
    veto = payload.get("veto") or {}
    return [
        *(_cell(event[name]) for name in HEADER[:3]),
        *(_cell(payload.get(name)) for name in COLUMNS),
        *(_cell(veto.get(name)) for name in _VETO),
        *(_cell(payload.get(name)) for name in _JSON),
    ]


def _cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value)
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


def _csv(rows: list[Any]) -> bytes:
    """Return lines of CSV as RFC 4180 has it, in UTF-8."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
