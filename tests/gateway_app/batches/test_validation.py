"""What makes a batch fail before it runs, line by line."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Row

from gateway_app.batches import items, validation
from gateway_app.batches.batches import Batches
from gateway_app.batches.claims import take
from gateway_app.batches.driver import drive
from gateway_app.batches.files import Files
from gateway_app.governance.api_keys import Caller
from tasks.db import Database
from tasks.errors import InvalidRequest, NotFound
from tasks.schema_batches import batch_items, file_chunks
from tasks.schema_batches import batches as batches_table
from tests.gateway_app.batches.fakes import URL, FakeGateway, jsonl, line, store


class Bench:
    """Runs batches of given content."""

    def __init__(
        self, database: Database, files: Files, batches: Batches, caller: Caller, gateway: FakeGateway
    ) -> None:
        self.database, self.files, self.batches = database, files, batches
        self.caller, self.gateway = caller, gateway

    def run(self, content: bytes, **limits: Any) -> Row[Any]:
        """Return the batch's row once it has ended."""
        created = self.batches.create(self.caller, URL, store(self.files, self.database, self.caller, content))
        claim = take(self.database, "test", 30)
        assert claim is not None
        for _ in drive(self.gateway.services(self.files, **limits), claim):
            self.gateway.work()
        query = sa.select(batches_table).where(batches_table.c.batch_id == created.batch_id)
        return self.database.read(lambda connection: connection.execute(query).one())


@pytest.fixture
def bench(database: Database, files: Files, batches: Batches, caller: Caller, gateway: FakeGateway) -> Bench:
    """Return the bench."""
    return Bench(database, files, batches, caller, gateway)


def told(row: Row[Any]) -> list[tuple[str, int | None]]:
    """Return the codes and lines of a failed batch's errors."""
    assert (row.status, row.output_file_id, row.error_file_id) == ("failed", None, None)
    assert row.ended_at is not None
    return [(error["code"], error["line"]) for error in row.errors]


def test_everything_wrong_is_told(bench: Bench) -> None:
    """All problems of a file at once, in the order of its lines; blank lines count as lines and are no problem."""
    content = b"\n".join(
        [jsonl(line("a")).strip(), b"", b"{", jsonl(line("a")).strip(), jsonl(line("b", url="/x")).strip(), b"   "]
    )
    row = bench.run(content)
    assert told(row) == [("invalid_json_line", 3), ("duplicate_custom_id", 4), ("url_mismatch", 5)]
    assert row.errors[1]["param"] == "custom_id"
    assert not bench.gateway.submitted
    query = sa.select(sa.func.count()).select_from(batch_items)
    assert bench.database.read(lambda connection: connection.execute(query).scalar()) == 0


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\n\t\n", b"\xef\xbb\xbf"])
def test_nothing_to_do(bench: Bench, content: bytes) -> None:
    """A file without requests."""
    assert told(bench.run(content)) == [("empty_file", None)]


def test_duplicates_far_apart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates are found within and across the groups that are stored together."""
    monkeypatch.setattr(validation, "_GROUP_LINES", 7)
    monkeypatch.setattr(items, "_SLICE", 5)
    names = [f"r-{number % 20}" for number in range(30)]
    assert told(bench.run(jsonl(*map(line, names)))) == [("duplicate_custom_id", number) for number in range(21, 31)]
    query = sa.select(sa.func.count()).select_from(batch_items)
    assert bench.database.read(lambda connection: connection.execute(query).scalar()) == 0


def test_too_many_requests(bench: Bench) -> None:
    """Up to the limit is fine, one more is not; nor are blank lines without end."""
    lines = [line(f"r-{number}") for number in range(6)]
    assert bench.run(jsonl(*lines[:5]), max_lines=5).status == "completed"
    assert told(bench.run(jsonl(*lines), max_lines=5)) == [("too_many_tasks", 6)]
    assert told(bench.run(b"\n" * 10_000, max_lines=5)) == [("too_many_tasks", 11)]


def test_only_some_problems_of_many_are_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is wrong throughout is not read to its end, and its batch stays small."""
    monkeypatch.setattr(validation, "_GROUP_LINES", 10)
    assert len(told(bench.run(b"{\n" * 3000))) == validation.MAX_PROBLEMS


def test_a_file_that_is_damaged(bench: Bench) -> None:
    """Chunks that were swapped do not open; the batch fails and says so."""
    content = jsonl(*(line(f"r-{number}", body={"pad": "x" * 1000}) for number in range(1000)))
    created = bench.batches.create(bench.caller, URL, store(bench.files, bench.database, bench.caller, content))
    numbers = sa.case((file_chunks.c.number == 0, 99), else_=file_chunks.c.number)
    swap = sa.update(file_chunks).values(number=numbers)
    bench.database.write(lambda connection: connection.execute(swap) and None)
    back = sa.update(file_chunks).where(file_chunks.c.number == 1).values(number=0)
    bench.database.write(lambda connection: connection.execute(back) and None)
    claim = take(bench.database, "test", 30)
    assert claim is not None
    list(drive(bench.gateway.services(bench.files), claim))
    query = sa.select(batches_table).where(batches_table.c.batch_id == created.batch_id)
    assert told(bench.database.read(lambda connection: connection.execute(query).one())) == [("file_unreadable", None)]


def test_what_a_batch_cannot_be_made_of(bench: Bench) -> None:
    """Files that are unknown, another organization's, or no input."""
    file_id = store(bench.files, bench.database, bench.caller, jsonl(line("a")))
    for caller, name in ((Caller("k", "other"), file_id), (bench.caller, "file-" + "0" * 32), (bench.caller, "a\x00b")):
        with pytest.raises(NotFound):
            bench.batches.create(caller, URL, name)
    output = bench.run(jsonl(line("b"))).output_file_id
    with pytest.raises(InvalidRequest):
        bench.batches.create(bench.caller, URL, output)
