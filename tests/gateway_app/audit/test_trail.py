"""One row of the record is one event of MetaQore's contract."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_args

import pytest

from gateway_app.api.audit import Kind
from gateway_app.audit.trail import (
    COLUMNS,
    DETAILS,
    EVENT_TYPES,
    NOT_IN_PAYLOAD,
    EventName,
    contract_event,
    line,
    name_in,
)
from gateway_app.openapi.answers.audit import AuditPayload, EventType
from tasks.schema import CHANGE_KINDS, KINDS, REQUEST_KINDS, audit_events
from tests.gateway_app.audit.recording import DECISION, VETO

NAME = EventName("gw_019d0c3a5b7e7c21a4f06d1e8b3c9f52", "admitted", 0)
CONTRACT = {
    "routing_decision": {"agent_name", "task_type", "sensitivity", "provider", "policy", "reason"},
    "veto": {"veto", "agent_name", "task_type", "sensitivity", "provider"},
}
AT = datetime(2026, 1, 5, 11, 0, tzinfo=timezone(timedelta(hours=1)))


def row(kind: str = "admitted", **facts: Any) -> dict[str, Any]:
    """Return a row with all columns; those not given are null."""
    blank: dict[str, Any] = dict.fromkeys(audit_events.c.keys())
    known = {"request_id": NAME.request_id, "kind": kind, "attempt": 0, "epoch": 1, "occurred_at": AT, "written_in": 0}
    return blank | known | {"organization": "acme", "api_key_id": "key_1"} | facts


def test_every_column_has_its_place() -> None:
    """A column that is added to the table must be put into the payload, or be left out knowingly."""
    assert sorted([*COLUMNS, *NOT_IN_PAYLOAD]) == sorted(audit_events.c.keys())
    assert not set(COLUMNS) & set(NOT_IN_PAYLOAD)


def test_the_kinds_are_everywhere_the_same() -> None:
    """In the table, in the API and its description, and on the page."""
    types = tuple(EVENT_TYPES.get(kind, kind) for kind in KINDS)
    page = Path(__file__).parents[3] / "docs" / "audit.md"
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page.read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(zip(KINDS, types, strict=True))
    assert set(get_args(Kind)) == set(KINDS)
    assert set(get_args(EventType)) == set(types)


def test_every_payload_is_described() -> None:
    """The API's description names every key that a payload can have."""
    assert set(AuditPayload.model_fields) == {*COLUMNS, *DETAILS, "change", "details"}


def test_a_routing_decision() -> None:
    """The contract's keys, whatever is known; then further ones, none of them null."""
    details = {
        "flags": {"private": True, "sensitive": False, "security": False},
        "policy_version": 3,
        "psmp": {"mode": "strict"},
        "detected": {"email": 2},
        "other": 1,
    }
    event = contract_event(row(agent_name="planner", **DECISION, prompt_tokens=12, details=details))
    assert list(event) == ["timestamp", "event_type", "organization", "payload"]
    assert event["timestamp"] == "2026-01-05T10:00:00.000000+00:00"
    assert (event["event_type"], event["organization"]) == ("routing_decision", "acme")
    payload = event["payload"]
    assert {name: payload[name] for name in CONTRACT["routing_decision"]} == {"agent_name": "planner", **DECISION}
    assert payload["prompt_tokens"] == 12
    assert {name: payload[name] for name in ("flags", "policy_version", "psmp", "detected")} == {
        name: details[name] for name in ("flags", "policy_version", "psmp", "detected")
    }
    assert payload["details"] == {"other": 1}
    assert None not in payload.values()


def test_a_veto() -> None:
    """It holds the veto object; the payload's `reason` is a routing decision's alone."""
    facts = {**DECISION, "reason": VETO["reason"], "provider": "openrouter"}
    event = contract_event(row("vetoed", agent_name="planner", **facts, details={"veto": VETO, "policy_version": 0}))
    assert event["event_type"] == "veto"
    assert event["payload"]["veto"] == VETO
    assert event["payload"]["provider"] == "openrouter"
    assert event["payload"]["policy_version"] == 0
    assert "reason" not in event["payload"]


def test_a_veto_whose_object_is_lost() -> None:
    """It is made of the columns, so that MetaQore still counts it by its policy."""
    event = contract_event(row("vetoed", **{**DECISION, "reason": VETO["reason"]}))
    assert event["payload"]["veto"] == VETO


@pytest.mark.parametrize("kind", REQUEST_KINDS)
def test_what_is_not_known(kind: str) -> None:
    """The contract's keys are there all the same; nothing else that is null is."""
    event = contract_event(row(kind))
    wanted = CONTRACT.get(event["event_type"], set())
    assert wanted <= set(event["payload"])
    assert {name for name, value in event["payload"].items() if value is None} <= wanted
    assert event["event_type"] == {"admitted": "routing_decision", "vetoed": "veto"}.get(kind, kind)


@pytest.mark.parametrize("kind", CHANGE_KINDS)
def test_a_change_looks_like_no_decision(kind: str) -> None:
    """Its policy and its reason are the change's, and are counted with no request's."""
    details = {"from": {"policy": "default_local_first"}, "to": {"policy": "compliance_local_only"}, "reason": "audit"}
    event = contract_event(row(kind, policy="compliance_local_only", reason="for the audit", details=details))
    assert event["event_type"] == kind
    payload = event["payload"]
    assert not {"policy", "reason", "provider", "veto", "sensitivity"} & set(payload)
    assert payload["change"] == {"policy": "compliance_local_only", **details}
    assert (payload["api_key_id"], payload["request_id"]) == ("key_1", NAME.request_id)


def test_a_line_is_one_line() -> None:
    """To every reader: `splitlines` knows more line ends than the line feed, and JSON no NaN."""
    strange = 'a\u2028b\u0085c\x0bd\ne"\\f\u00e4\U0001f600'
    written = line(
        contract_event(row(agent_name=strange, total_ms=float("nan"), details={"psmp": {"x": float("inf")}}))
    )
    assert len(written.decode().splitlines()) == 1
    assert written.endswith(b"\n")
    event = json.loads(written, parse_constant=pytest.fail)
    assert event["payload"]["agent_name"] == strange
    assert "total_ms" not in event["payload"]
    assert event["payload"]["psmp"] == {"x": None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_tells_its_event(kind: str) -> None:
    """Which is how a follower finds what it wrote. What an attempt may leave several of is told apart by the epoch."""
    expected = EventName(NAME.request_id, kind, 3, 2 if kind == "requeued" else None)
    assert EventName.of(row(kind, attempt=3, epoch=2)) == expected
    assert name_in(line(contract_event(row(kind, attempt=3, epoch=2)))) == expected
    assert EventName.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"null",
        b'["request_id"]',
        b'"request_id"',
        b'{"request_id": 1}',
        b'{"payload": {"request_id": 1}, "event_type": ["x"]}',
        b'{"payload": {"request_id": "gw_019d0c3a5b7e7c21a4f06d1e8b3c9f52", "attempt": 0}, "event_type": "alert"}',
        b'{"payload": {"request_id": "gw_1", "attempt": 0}, "event_type": "veto"}',
        b'{"payload": {"request_id": "' + NAME.request_id.encode() + b'", "attempt": 0}, "event_type": "veto"',
        b'{"a":' * 100_000 + b'"request_id"',
        b'\xff"request_id"',
    ],
)
def test_lines_of_others(content: bytes) -> None:
    """They are nobody's event here, however they look."""
    assert name_in(content) is None


def test_names_as_text() -> None:
    """There and back; what is none is none."""
    assert EventName.parse(str(NAME)) == NAME
    for text in ("", "gw_1.admitted.0", f"{NAME}x", f"{NAME}\n", str(NAME).replace("admitted", "gone"), f"{NAME}.1"):
        assert EventName.parse(text) is None
    again = str(NAME).replace("admitted", "requeued")
    assert (EventName.parse(again), str(EventName.parse(f"{again}.2"))) == (None, f"{again}.2")
