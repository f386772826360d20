"""`bin/run --once`: two tasks for one agent through the whole gateway, shown as they run, and what was recorded.

No request used the agent's profile before the first task, so the engine computes all of its prompt; the second has
another directive, and finds the profile in the KV cache. The difference in the time to the first token is what the
gateway's scheduling keeps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from gateway_app.local.client import Client
from tasks.db import Database
from tasks.schema import audit_events
from tasks.settings import DatabaseGroup
from tasks.stream import TERMINAL_EVENTS

AGENT = "incident-responder"
CONTEXT = "checkout-7 since 14:04: connection pool exhausted (size 10)"
DIRECTIVES = {
    "cold": "Name the most likely cause of the slow payments.",
    "cached": "Name one thing to check first.",
}
MAX_TOKENS = 48
COLUMNS = [
    *("occurred_at", "kind", "attempt", "request_id", "agent_name"),
    *("task_type", "sensitivity", "provider", "policy", "reason"),
]


class DemoFailed(Exception):
    """The demonstration could not be completed; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was learnt from one task: its id, the client's own time to the first token, and the gateway's report."""

    request_id: str
    first_token_ms: float
    completed: dict[str, Any]


def run(client: Client, database: DatabaseGroup) -> None:
    """Send the tasks and print everything. Raises DemoFailed, or what the client raises."""
    answers = {label: _ask(client, label, directive) for label, directive in DIRECTIVES.items()}
    print("\nWhat was recorded of them, in the table audit_events:\n")
    _print_table(_audit_rows(database, [answer.request_id for answer in answers.values()]))
    print("\nTime to the first token:\n")
    _print_table(_times(answers))


def _ask(client: Client, label: str, directive: str) -> Answer:
    print(f"\n{AGENT}, profile {label}: {directive}\n", flush=True)
    began, first_ms = time.monotonic(), None
    # Greedy, so that the demonstration says the same everywhere.
    sampling = {"max_tokens": MAX_TOKENS, "temperature": 0.0}
    task = client.submit({"agent": AGENT, "directive": directive, "context": CONTEXT, "sampling": sampling})
    for event in client.events(task["links"]["events"]):
        if event.name == "delta":
            first_ms = first_ms or (time.monotonic() - began) * 1000
            sys.stdout.write(event.data["text"])
            sys.stdout.flush()
        elif event.name == "reset":
            print("\n[the worker was lost; the answer starts again]")
        elif event.name == "completed":
            print()
            return Answer(task["id"], first_ms or (time.monotonic() - began) * 1000, event.data)
        elif event.name in TERMINAL_EVENTS:
            raise DemoFailed(f"the task {event.name}: {event.data}")
    raise DemoFailed("the stream ended before the answer did")


def _audit_rows(database: DatabaseGroup, request_ids: Sequence[str]) -> list[list[str]]:
    query = (
        sa.select(*(audit_events.c[name] for name in COLUMNS))
        .where(audit_events.c.request_id.in_(request_ids))
        .order_by(audit_events.c.occurred_at)
    )
    reader = Database(database)
    try:
        rows = reader.read(lambda connection: connection.execute(query).all())
    finally:
        reader.close()
    kinds = [row.kind for row in rows]
    if kinds.count("completed") != len(request_ids):
        raise DemoFailed(f"not every task has its terminal event; recorded were {', '.join(kinds)}")
    cells = [
        [f"{row.occurred_at:%H:%M:%S.%f}"[:-3], *("" if cell is None else str(cell) for cell in row[1:])]
        for row in rows
    ]
    return [COLUMNS, *cells]


def _times(answers: dict[str, Answer]) -> list[list[str]]:
    rows = [["profile", "seen by the client", "reported", "of it prefill", "prompt tokens", "of them cached"]]
    for label, answer in answers.items():
        timings, usage = answer.completed["timings"], answer.completed["usage"]
        times = (answer.first_token_ms, timings["first_token_ms"], timings["prefill_ms"])
        shown = ["" if value is None else f"{value:,.0f} ms" for value in times]
        rows.append([label, *shown, str(usage["prompt_tokens"]), str(usage["cached_tokens"])])
    return rows


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
