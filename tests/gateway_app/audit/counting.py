"""The record as Python sees it: events by request and by period, and the sums that answers are made of.

Nothing here knows the queries of docs/audit-queries.md; it is what they are compared with. Events are dictionaries of the
table's columns, in no order.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from tasks.schema import REQUEST_KINDS

Event = dict[str, Any]
Rows = list[dict[str, Any]]


class Asked:
    """The events, and what was asked for: the parameters by name, `since` and `until` as instants."""

    def __init__(self, events: list[Event], keys: Mapping[str, str], parameters: Mapping[str, Any]) -> None:
        self.events, self.keys, self.parameters = events, keys, parameters
        self.lives: dict[str, list[Event]] = defaultdict(list)
        for event in events:
            if event["kind"] in REQUEST_KINDS:
                self.lives[event["request_id"]].append(event)

    def happened(self, *kinds: str, everybody: bool = False) -> list[Event]:
        """Return events of these kinds in the period, of the organization that was asked for or of all."""
        return [
            event
            for event in self.events
            if event["kind"] in kinds
            and self.parameters["since"] <= event["occurred_at"] < self.parameters["until"]
            and (everybody or event["organization"] == self.parameters["organization"])
        ]

    def arrived(self) -> dict[str, list[Event]]:
        """Return the requests, with their events, that arrived in the period."""
        first, last = self.parameters["since_id"], self.parameters["until_id"]
        return {request_id: life for request_id, life in self.lives.items() if first <= request_id < last}

    def decided(self, *kinds: str) -> list[Event]:
        """Return the first decision on each request: as it was admitted, or refused without being queued."""
        queued = {request_id for request_id, life in self.lives.items() if of(life, "admitted")}
        return [
            event for event in self.happened(*kinds) if event["kind"] == "admitted" or event["request_id"] not in queued
        ]


def of(life: Iterable[Event], *kinds: str) -> Event | None:
    """Return the first event of these kinds."""
    return next((event for event in life if event["kind"] in kinds), None)


def grouped(events: Iterable[Event], key: Callable[[Event], Any]) -> list[tuple[Any, list[Event]]]:
    """Return the events by what `key` tells of them, in its order."""
    groups: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        groups[key(event)].append(event)
    return sorted(groups.items())


def total(events: Iterable[Event], column: str) -> int:
    """Return a column's sum."""
    return sum(event[column] for event in events)


def percent(part: int, whole: int) -> float:
    """Return a share to two places, as SQL rounds it."""
    return float((Decimal(100 * part) / Decimal(whole)).quantize(Decimal("0.01"), ROUND_HALF_UP))


def percentile(values: Iterable[float], share: int) -> float:
    """Return the smallest value that `share` percent of them do not exceed."""
    ordered = sorted(values)
    return next(value for index, value in enumerate(ordered, 1) if index * 100 >= share * len(ordered))


def hour(event: Event) -> str:
    """Return the hour in which it happened."""
    return f"{event['occurred_at']:%Y-%m-%d %H}"


def attempts(life: Iterable[Event]) -> list[Event]:
    """Return the starts of a request, in order."""
    return sorted((event for event in life if event["kind"] == "started"), key=lambda event: event["attempt"])


def times(events: Iterable[Event]) -> list[datetime]:
    """Return when they happened, in order."""
    return sorted(event["occurred_at"] for event in events)


def columns(event: Event, names: str) -> dict[str, Any]:
    """Return some of an event's columns."""
    return {name: event[name] for name in names.split()}


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with values that can be compared, whichever driver they came through."""
    return {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}"
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.startswith("{"):
        return json.loads(value)
    return value
