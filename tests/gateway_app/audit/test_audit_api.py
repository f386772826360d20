"""`/v1/audit`: one's own organization's events, page by page and whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import requests
from flask.testing import FlaskClient

from gateway_app.audit import events
from gateway_app.audit.trail import EventName, name_in
from tasks.db import Database
from tasks.errors import DatabaseUnavailable
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.gateway_app.audit.recording import DECISION, add, fill, opened
from tests.raw_http import RawClient
from tests.serving import serve

START = datetime(2026, 1, 5, 10, tzinfo=UTC)
SECOND = timedelta(seconds=1)
EVENTS = "/v1/audit/events"
EXPORT = "/v1/audit/export"


on_both = pytest.mark.parametrize("database_kind", ["sqlite", "postgresql"])


@pytest.fixture
def database_kind() -> str:
    """Return SQLite, where it is no matter."""
    return "sqlite"


@pytest.fixture
def record(configured: None) -> Iterator[Database]:
    """Return the gateway's record."""
    with opened(settings().database.url) as made:
        yield made


def some(record: Database, count: int, organization: str = "default") -> list[EventName]:
    """Record an event each second."""
    return [fill(record, 1, organization, at=START + number * SECOND)[0] for number in range(count)]


def ids(client: FlaskClient, **query: Any) -> tuple[list[str], bool]:
    """Return the ids of a page, and whether there are more."""
    answer = client.get(EVENTS, query_string=query)
    assert answer.status_code == 200, answer.text
    return [event["id"] for event in answer.get_json()["data"]], answer.get_json()["has_more"]


@on_both
def test_pages(client: FlaskClient, record: Database) -> None:
    """The newest first, or the oldest; each goes on after the last id of the one before."""
    written = [str(name) for name in some(record, 5)]
    some(record, 3, "other")
    assert ids(client) == (written[::-1], False)
    assert ids(client, order="asc", limit=2) == (written[:2], True)
    assert ids(client, order="asc", limit=2, after=written[1]) == (written[2:4], True)
    assert ids(client, order="asc", limit=2, after=written[3]) == (written[4:], False)
    assert ids(client, limit=3, after=written[3]) == (written[2::-1], False)


def test_what_a_page_shows(client: FlaskClient, record: Database) -> None:
    """The contract's event, under its id."""
    name = record.write(lambda connection: add(connection, "default", "admitted", at=START, **DECISION))
    (event,) = client.get(EVENTS).get_json()["data"]
    assert event["id"] == str(name)
    assert (event["timestamp"], event["event_type"]) == ("2026-01-05T10:00:00.000000+00:00", "routing_decision")
    assert event["payload"] | DECISION == event["payload"]


@on_both
def test_filters(client: FlaskClient, record: Database) -> None:
    """Each by itself, and together."""
    first, second, third = some(record, 3)
    other = record.write(lambda connection: add(connection, "default", "admitted", at=START + 9 * SECOND, **DECISION))
    assert ids(client, kind="admitted") == ([str(other)], False)
    assert ids(client, request_id=second.request_id) == ([str(second)], False)
    assert ids(client, agent="nobody") == ([], False)
    assert len(ids(client, agent="incident-responder")[0]) == 4
    assert ids(client, since="2026-01-05T10:00:01Z", until="2026-01-05T11:00:02+01:00") == ([str(second)], False)
    assert ids(client, since="2026-01-05T10:00:02Z", kind="received") == ([str(third)], False)
    assert ids(client, since="2026-01-06T00:00:00Z", until="2026-01-05T00:00:00Z") == ([], False)
    assert ids(client, until="0001-01-01T00:00:00+14:00") == ([], False)
    assert str(first) in ids(client, since="0001-01-01T00:00:00+14:00", until="9999-12-31T23:59:59-14:00")[0]


REFUSED = [
    (EVENTS, {"kind": "veto"}, "kind"),
    (EVENTS, {"limit": "0"}, "limit"),
    (EVENTS, {"limit": "101"}, "limit"),
    (EVENTS, {"request_id": "gw_1"}, "request_id"),
    (EVENTS, {"since": "yesterday"}, "since"),
    (EVENTS, {"since": "1700000000"}, "since"),
    (EVENTS, {"until": "2026-01-05T10:00:00"}, "until"),
    (EVENTS, {"after": "1-1"}, "after"),
    (EVENTS, {"after": "gw_019d0c3a5b7e7c21a4f06d1e8b3c9f52.admitted.0"}, "after"),
    (EVENTS, {"after": "gw_019d0c3a5b7e7c21a4f06d1e8b3c9f52.admitted.0\n"}, "after"),
    (EVENTS, {"after": "gw_019d0c3a5b7e7c21a4f06d1e8b3c9f52.admitted.999999999"}, "after"),
    (EVENTS, {"agent": ""}, "agent"),
    (EVENTS, {"organization": "other"}, "organization"),
    (EXPORT, {"format": "xml"}, "format"),
    (EXPORT, {"since": ""}, "since"),
    (EXPORT, {"organization": "other"}, "organization"),
]


def test_what_is_not_understood(client: FlaskClient) -> None:
    """It is refused by the field's name."""
    for path, query, field in REFUSED:
        answer = client.get(path, query_string=query)
        assert answer.status_code == 422, query
        assert [problem["field"] for problem in answer.get_json()["errors"]] == [field], query


def test_events_of_others(client: FlaskClient, record: Database) -> None:
    """They are nowhere to be found, also not as a place to go on from."""
    (name,) = some(record, 1, "other")
    assert ids(client) == ([], False)
    assert ids(client, request_id=name.request_id) == ([], False)
    assert client.get(EVENTS, query_string={"after": str(name)}).status_code == 422
    assert client.get(EXPORT).data == b""


@pytest.mark.parametrize("path", [EVENTS, EXPORT])
def test_a_key_is_needed(client: FlaskClient, path: str) -> None:
    """Whose role is no matter."""
    assert client.get(path, headers={"Authorization": "Bearer mq_nothing"}).status_code == 401
    assert client.get(path).status_code == 200


def test_an_export(client: FlaskClient, record: Database) -> None:
    """As lines under MetaQore's name of the file, or as a table."""
    written = some(record, 3)
    answer = client.get(EXPORT, query_string={"since": "2026-01-05T10:00:01Z"})
    assert answer.headers["Content-Type"] == "application/x-ndjson; charset=utf-8"
    assert answer.headers["Content-Disposition"] == "attachment; filename=compliance_audit_default.jsonl"
    assert [name_in(content) for content in answer.data.splitlines()] == written[1:]
    table = client.get(EXPORT, query_string={"format": "csv"})
    assert table.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert table.headers["Content-Disposition"] == "attachment; filename=compliance_audit_default.csv"
    assert table.data.count(b"\r\n") == 4


def test_names_in_headers(client: FlaskClient) -> None:
    """An organization is named by whoever made its key; no header breaks by it, and no path is made of it."""
    named = {
        "a/b": "attachment; filename=compliance_audit.jsonl",
        "\u00e4" * 200: "attachment; filename=compliance_audit.jsonl",
        '"; filename=x': 'attachment; filename="compliance_audit_\\"; filename=x.jsonl"',
        "caf\u00e9": "attachment; filename=compliance_audit_caf_.jsonl; filename*=UTF-8''compliance_audit_caf%C3%A9.jsonl",
    }
    for organization, header in named.items():
        answer = client.get(EXPORT, headers={"Authorization": f"Bearer {new_key(organization)}"})
        assert (answer.status_code, answer.headers["Content-Disposition"]) == (200, header)


def test_too_many_exports(configured: None, record: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs holds a place until its end, or until its client has gone."""
    monkeypatch.setenv(f"{PREFIX}AUDIT__MAX_EXPORTS", "1")
    settings.cache_clear()
    monkeypatch.setattr(events, "PAGE", 1)
    some(record, 3)
    reading, go_on = threading.Event(), threading.Event()
    page = events.page

    def slow(connection: Any, selection: Any, after: Any, limit: int, **more: Any) -> Any:
        if after is not None:
            reading.set()
            go_on.wait(20)
        return page(connection, selection, after, limit, **more)

    monkeypatch.setattr(events, "page", slow)
    with serve() as served:
        first = RawClient.to(served.url).ask("GET", EXPORT, Authorization=f"Bearer {served.key}")
        assert reading.wait(20)
        second = requests.get(f"{served.url}{EXPORT}", headers=served.headers, timeout=20)
        assert (second.status_code, second.json()["code"]) == (429, "too_many_exports")
        assert "Retry-After" in second.headers
        go_on.set()
        assert first.to_end().count(b"\n") == 3
        assert requests.get(f"{served.url}{EXPORT}", headers=served.headers, timeout=20).status_code == 200


def test_a_database_that_goes_away(configured: None, record: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning that is an answer; in the middle the response has no end, and its last line is whole."""
    monkeypatch.setattr(events, "PAGE", 2)
    some(record, 5)
    page = events.page

    def failing(connection: Any, selection: Any, after: Any, limit: int, **more: Any) -> Any:
        if after is not None or failing_at_once:
            raise DatabaseUnavailable
        return page(connection, selection, after, limit, **more)

    monkeypatch.setattr(events, "page", failing)
    with serve() as served:
        failing_at_once = True
        assert requests.get(f"{served.url}{EXPORT}", headers=served.headers, timeout=20).status_code == 503
        failing_at_once = False
        raw = RawClient.to(served.url).ask("GET", EXPORT, Authorization=f"Bearer {served.key}")
        assert raw.broken_off()
        assert raw.status == 200
        came = [part for part in raw.received.split(b"\r\n") if part.startswith(b"{")]
        assert [len(part.splitlines()) for part in came] == [2]
        assert came[0].endswith(b"\n")
        for content in came[0].splitlines():
            json.loads(content)
        with pytest.raises(requests.exceptions.RequestException):
            requests.get(f"{served.url}{EXPORT}", headers=served.headers, timeout=20).content  # noqa: B018
