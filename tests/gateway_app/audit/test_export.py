"""An export is a file that MetaQore reads: whole lines, in order, of one organization and one period."""

from __future__ import annotations

import csv
import io
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from gateway_app.audit import events
from gateway_app.audit.cli import audit
from gateway_app.audit.events import Selection
from gateway_app.audit.export import HEADER, export
from gateway_app.audit.trail import EventName, name_in
from tasks.audit.events import event
from tasks.db import Database
from tasks.errors import DatabaseUnavailable
from tasks.schema import audit_events
from tasks.settings import settings
from tests.gateway_app.audit.recording import DECISION, VETO, add, fill, names, opened, subject

START = datetime(2026, 1, 5, 10, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """Return an empty record."""
    with opened(migrated_url) as made:
        yield made


def lines(database: Database, selection: Selection) -> list[bytes]:
    """Export as lines."""
    chunks = [content for content, _ in export(database, selection, "jsonl")]
    assert all(content.endswith(b"\n") for content in chunks)
    return b"".join(chunks).splitlines(keepends=True)


def at_seconds(database: Database, count: int, organization: str = "acme") -> list[EventName]:
    """Record an event each second."""
    return [fill(database, 1, organization, at=START + number * SECOND)[0] for number in range(count)]


def test_a_period(database: Database) -> None:
    """From its first instant to before its last, of one organization, the oldest first."""
    ours = at_seconds(database, 6)
    at_seconds(database, 6, "other")
    whole = Selection("acme")
    assert [name_in(content) for content in lines(database, whole)] == ours
    part = Selection("acme", START + SECOND, START + 4 * SECOND)
    assert [name_in(content) for content in lines(database, part)] == ours[1:4]
    assert lines(database, Selection("acme", START + 9 * SECOND)) == []
    assert lines(database, Selection("nobody")) == []


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_pages_of_any_size(database: Database, size: int, newest_first: bool) -> None:
    """Also where many events are of one instant, and of one request."""

    def write(connection: sa.Connection) -> None:
        whom = subject()
        rows = [event(whom, kind, at=START, attempt=number) for kind in ("started", "received") for number in (1, 2)]
        connection.execute(sa.insert(audit_events), rows)

    database.write(write)
    at_seconds(database, 3)
    found: list[EventName] = []
    last: Any = None

    def page(connection: sa.Connection) -> Sequence[Any]:
        return events.page(connection, Selection("acme"), last, size, newest_first=newest_first)

    while more := database.read(page):
        found += [EventName.of(row) for row in more]
        last = more[-1]
    assert sorted(found, key=str) == sorted(names(database), key=str)
    instants = {(row.request_id, row.kind, row.attempt): row.occurred_at for row in database.read(_all)}
    order = [instants[name.request_id, name.kind, name.attempt] for name in found]
    assert order == sorted(order, reverse=newest_first)


def _all(connection: sa.Connection) -> list[Any]:
    return list(connection.execute(sa.select(audit_events)))


def test_csv(database: Database) -> None:
    """A table with a header. Nothing in it is a formula, and what is text stays one cell."""
    evil = ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\r=1", 'a"b,c', "line\nfeed", "'=1", "\u00e4\u2028"]

    def write(connection: sa.Connection) -> None:
        for number, text in enumerate(evil):
            add(connection, kind="admitted", at=START + number * SECOND, **{**DECISION, "task_type": text})
        add(connection, kind="vetoed", at=START + 99 * SECOND, **DECISION, details={"veto": VETO, "psmp": {"a": "=1"}})

    database.write(write)
    content = b"".join(part for part, _ in export(database, Selection("acme"), "csv"))
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    assert tuple(rows[0]) == HEADER
    shown = [row["task_type"] for row in rows[:-1]]
    assert shown == [f"'{text}" if text[0] in "=+-@\t\r" else text for text in evil]
    assert all(not cell.startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows for cell in row.values())
    last = rows[-1]
    assert (last["event_type"], last["veto.reason"]) == ("veto", VETO["reason"])
    assert (last["veto.policy_violated"], last["veto.severity"]) == (VETO["policy_violated"], "critical")
    assert json.loads(last["psmp"]) == {"a": "=1"}
    assert last["timestamp"] == "2026-01-05T10:01:39.000000+00:00"


def test_memory_does_not_grow(sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty times the events take no more than one page does."""
    monkeypatch.setattr(events, "PAGE", 100)
    path = tmp_path / "gateway.db"
    path.write_bytes(sqlite_template.read_bytes())
    with opened(f"sqlite:///{path}") as database:

        def write(connection: sa.Connection) -> None:
            whom = subject()
            rows = [event(whom, "started", at=START + number * SECOND, attempt=number) for number in range(3000)]
            connection.execute(sa.insert(audit_events), rows)

        database.write(write)

        def peak(until: datetime) -> int:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            count = sum(number for _, number in export(database, Selection("acme", until=until), "jsonl"))
            assert count == (until - START).total_seconds()
            return tracemalloc.get_traced_memory()[1] - before

        tracemalloc.start()
        try:
            one, all_of_them = peak(START + 100 * SECOND), peak(START + 3000 * SECOND)
        finally:
            tracemalloc.stop()
    assert all_of_them < one * 2


def test_a_database_that_goes_away(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle: what came before ends with a whole line, and then there is an error, no end."""
    monkeypatch.setattr(events, "PAGE", 2)
    at_seconds(database, 5)
    chunks = export(database, Selection("acme"), "jsonl")
    first, count = next(chunks)
    assert (count, first.count(b"\n"), first[-1:]) == (2, 2, b"\n")

    def away(_self: Database, _work: Any) -> Any:
        raise DatabaseUnavailable

    monkeypatch.setattr(Database, "read", away)
    with pytest.raises(DatabaseUnavailable):
        next(chunks)


class TestTheCommand:
    """`flask audit export`, as an operator runs it."""

    @pytest.fixture(autouse=True)
    def url(self, sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        """Configure a record of four events."""
        path = tmp_path / "gateway.db"
        path.write_bytes(sqlite_template.read_bytes())
        url = f"sqlite:///{path}"
        with opened(url) as database:
            at_seconds(database, 3)
            at_seconds(database, 1, "other")
        monkeypatch.setenv("DATABASE_URL", url)
        return url

    def run(self, *arguments: str) -> Result:
        """Run it."""
        return CliRunner().invoke(audit, ["export", *arguments])

    def test_to_the_terminal_and_to_a_file(self, tmp_path: Path) -> None:
        """The same lines, and a count beside them; a file takes the place of an earlier one."""
        output = tmp_path / "compliance_audit_acme.jsonl"
        output.write_text("earlier")
        period = ("--organization", "acme", "--since", "2026-01-05", "--until", "2026-01-05T11:00:02+01:00")
        shown = self.run(*period)
        assert (shown.exit_code, shown.stdout.count("\n"), shown.stderr) == (0, 2, "2 events of organization acme\n")
        written = self.run(*period, "--output", str(output))
        assert (written.exit_code, written.stdout, output.read_text()) == (0, "", shown.stdout)
        assert [path.name for path in tmp_path.glob(".*")] == []

    def test_an_empty_period(self) -> None:
        """It is no error, and it is said what MetaQore thinks of it."""
        result = self.run("--organization", "acme", "--until", "2020-01-01")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "SOC2" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (("--since", "yesterday"), "2026-01-31"),
            (("--since", "2026-01-05T10:00:00"), "offset"),
            (("--format", "xml"), "jsonl"),
            (("--output", "/nowhere/at/all"), "No such file or directory"),
        ],
    )
    def test_what_cannot_be_done(self, arguments: tuple[str, ...], told: str) -> None:
        """It is said, without a traceback."""
        result = self.run(*arguments)
        assert result.exit_code != 0
        assert told in result.stderr
        assert isinstance(result.exception, SystemExit)

    def test_a_database_of_the_release_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is said how to bring it up to date."""
        monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'empty.db'}")
        settings.cache_clear()
        result = self.run("--organization", "acme")
        assert (result.exit_code, "flask db upgrade" in result.stderr) == (1, True)

    def test_it_fails_in_the_middle(self, tmp_path: Path, url: str) -> None:
        """The earlier file stays, and nothing half is left beside it."""
        output = tmp_path / "trail.jsonl"
        output.write_text("earlier")
        with opened(url) as database:
            database.write(lambda connection: connection.exec_driver_sql("DROP TABLE audit_events"))
        result = self.run("--output", str(output))
        assert result.exit_code != 0
        assert isinstance(result.exception, SystemExit)
        assert output.read_text() == "earlier"
        assert [path.name for path in tmp_path.glob(".*")] == []
