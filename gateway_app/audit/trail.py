"""An audit event as a line of MetaQore's trail.

One row of `audit_events` becomes one event. `admitted` is MetaQore's `routing_decision`, `vetoed` its `veto`; every
other kind is an event type of its own name. The payload holds the row's columns under their own names, without those
that are null, so that what MetaQore counts by a payload's key is what SQL counts by the column. A request that was
refused before anything was decided of it has neither decision nor veto, but `received` and `failed`; one that was
vetoed when it left the queue has both.

A change of a policy or a profile is no request: what was changed, by whom and why stands under `change`, so that its
`policy` or `reason` is never taken for a decision's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tasks.ids import PATTERN
from tasks.schema import CHANGE_KINDS, KINDS

#: A row of `audit_events`, by the names of its columns.
Row = Mapping[Any, Any]

#: The types that MetaQore has a name of its own for.
EVENT_TYPES = {"admitted": "routing_decision", "vetoed": "veto"}
#: What a payload takes from a row, in the order in which it is written.
COLUMNS = (
    *("agent_name", "task_type", "sensitivity", "provider", "policy", "reason"),
    *("request_id", "attempt", "epoch", "api_key_id", "profile_version", "static_profile_hash"),
    *("project_id", "artifact_id", "task_id", "code", "worker", "model"),
    *("prompt_tokens", "cached_tokens", "output_tokens"),
    *("queued_ms", "prefill_ms", "first_token_ms", "total_ms", "payload_sha256"),
)
#: Columns that are no part of a payload: they stand above it, or tell how the row is kept.
NOT_IN_PAYLOAD = ("kind", "occurred_at", "organization", "details", "written_in")
#: Which of a request's details are keys of the payload; others stay together under `details`.
DETAILS = (
    *("veto", "vetoed_by", "flags", "provider_hint", "policy_version", "detection", "detected", "detected_flags"),
    *("psmp", "finish_reason"),
)
#: What a decision says of its worker, and so of what it did for others: the trail is an organization's own.
OF_ALL = "worker_facts"
#: What the contract wants in these events, even if it is null.
_ALWAYS = {
    "routing_decision": ("agent_name", "task_type", "sensitivity", "provider", "policy", "reason"),
    "veto": ("veto", "agent_name", "task_type", "sensitivity", "provider"),
}
#: Of a change these say who and what; its other columns are part of the change.
_OF_CHANGES = ("agent_name", "request_id", "attempt", "epoch", "api_key_id")
#: Of these one attempt may leave several, so that their names say the epoch too.
_OF_EPOCHS = ("requeued",)
#: An event's name as a regular expression, without anchors.
EVENT_NAME = rf"({PATTERN})\.({'|'.join(KINDS)})\.([0-9]{{1,9}})(?:\.([0-9]{{1,9}}))?"
_NAME = re.compile(EVENT_NAME)


@dataclass(frozen=True, slots=True)
class EventName:
    """What tells an event from all others. `epoch` is None but for those of which an attempt may leave several."""

    request_id: str
    kind: str
    attempt: int
    epoch: int | None = None

    @classmethod
    def of(cls, row: Row) -> EventName:
        """Return the name of a row of `audit_events`."""
        epoch = row["epoch"] if row["kind"] in _OF_EPOCHS else None
        return cls(row["request_id"], row["kind"], row["attempt"], epoch)

    @classmethod
    def parse(cls, text: str) -> EventName | None:
        """Return the name that `str` wrote, or None if it is none."""
        found = _NAME.fullmatch(text)
        if found is None or (found[4] is not None) != (found[2] in _OF_EPOCHS):
            return None
        return cls(found[1], found[2], int(found[3]), None if found[4] is None else int(found[4]))

    def __str__(self) -> str:
        name = f"{self.request_id}.{self.kind}.{self.attempt}"
        return name if self.epoch is None else f"{name}.{self.epoch}"


def contract_event(row: Row) -> dict[str, Any]:
    """Return a row of `audit_events` as the contract's event. It shares nothing with the row that could be changed."""
    event_type = EVENT_TYPES.get(row["kind"]) or str(row["kind"])
    return {
        "timestamp": timestamp(row["occurred_at"]),
        "event_type": event_type,
        "organization": row["organization"],
        "payload": _change(row) if row["kind"] in CHANGE_KINDS else _payload(row, event_type),
    }


def line(event: Mapping[str, Any]) -> bytes:
    """Return an event as a line. All but ASCII is escaped: a reader may split lines at more than the line feed."""
    try:
        written = json.dumps(event, allow_nan=False)
    except ValueError:
        # Somebody's answer that is part of the details held what is no number; the rest of it is still worth reading.
        written = json.dumps(_finite(event), allow_nan=False)
    return written.encode("ascii") + b"\n"


def name_in(content: bytes) -> EventName | None:
    """Return the name of the event in a line of a trail, or None if the gateway did not write it."""
    if b'"request_id"' not in content:
        return None
    try:
        event = json.loads(content)
    except (ValueError, RecursionError):
        return None
    payload = event.get("payload") if isinstance(event, dict) else None
    if not isinstance(payload, dict):
        return None
    event_type = event.get("event_type")
    kind = next((kind for kind, name in EVENT_TYPES.items() if name == event_type), event_type)
    name = f"{payload.get('request_id')}.{kind}.{payload.get('attempt')}"
    return EventName.parse(f"{name}.{payload.get('epoch')}" if kind in _OF_EPOCHS else name)


def timestamp(moment: datetime) -> str:
    """Return an instant in the contract's form: ISO 8601 in UTC, with microseconds and offset."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def _payload(row: Row, event_type: str) -> dict[str, Any]:
    always = _ALWAYS.get(event_type, ())
    details = dict(row["details"] or {})
    given = {name: _plain(row[name]) for name in COLUMNS}
    given |= {name: details.pop(name, None) for name in DETAILS}
    if event_type == "veto":
        # The reason of a veto is its object's; a payload's own is that of a routing decision.
        given["veto"] = given["veto"] or _veto(row)
        del given["reason"]
    if isinstance(schedule := details.get("schedule"), dict):
        details["schedule"] = {name: value for name, value in schedule.items() if name != OF_ALL}
    given["details"] = details or None
    return {name: value for name, value in given.items() if value is not None or name in always}


def _veto(row: Row) -> dict[str, Any]:
    """Return the object of a veto whose event does not hold it, from what its columns say."""
    violated = row["policy"] or "unknown"
    reason = row["reason"] or row["code"] or "vetoed"
    return {"reason": reason, "policy_violated": violated, "severity": "critical", "details": {"policy": violated}}


def _change(row: Row) -> dict[str, Any]:
    columns = {name: _plain(row[name]) for name in COLUMNS if name not in _OF_CHANGES and row[name] is not None}
    given = {name: row[name] for name in _OF_CHANGES if row[name] is not None}
    return {**given, "change": {**columns, **(row["details"] or {})}}


def _plain(value: Any) -> Any:
    """Return a column's value as JSON can say it: a number that is none is unknown."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else _plain(value)
