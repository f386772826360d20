"""A batch from its file to its answers: every way a line can end, and what is written of it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Row

from gateway_app.batches import items
from gateway_app.batches.batches import Batches
from gateway_app.batches.claims import ClaimLost, take
from gateway_app.batches.driver import drive
from gateway_app.batches.files import Files
from gateway_app.batches.ports import Backoff, Services
from gateway_app.governance.api_keys import ApiKeys, Caller
from tasks.db import Database
from tasks.errors import (
    GatewayError,
    QueueFull,
    QueueUnavailable,
    ServiceUnavailable,
    UnknownAgent,
)
from tasks.schema import audit_events
from tasks.schema_batches import batch_items
from tests.gateway_app.batches.driving import Create, claimed, lines_of, row_of, run
from tests.gateway_app.batches.fakes import URL, Busy, FakeGateway, jsonl, line, store


def test_a_whole_batch(gateway: FakeGateway, files: Files, create: Create, batches: Batches) -> None:
    """Answers in the order of the input, with usage, counts and all the instants; no error file without errors."""
    created = create(*(line(f"r-{number}") for number in range(40)), metadata={"team": "blue"}, output_seconds=3600)
    assert (created.status, created.total) == ("validating", 0)
    row = run(gateway.services(files, window=7, group=3), gateway)
    assert (row.status, row.total, row.completed, row.failed) == ("completed", 40, 40, 0)
    assert row.created_at <= row.in_progress_at <= row.finalizing_at <= row.ended_at
    assert row.expires_at == row.created_at + timedelta(hours=24)
    assert row.error_file_id is None
    assert batches.metadata(row) == {"team": "blue"}
    answers = lines_of(files, row.output_file_id)
    assert [answer["custom_id"] for answer in answers] == [f"r-{number}" for number in range(40)]
    assert len({answer["id"] for answer in answers}) == 40
    first = answers[0]
    assert first["error"] is None
    assert first["response"]["status_code"] == 200
    assert first["response"]["body"]["echo"] == {"name": "r-0"}
    assert first["response"]["request_id"].startswith("gw_")
    assert row.usage["input_tokens"] == 400
    assert row.usage["total_tokens"] == 480
    file = files.find(row.output_file_id, "default")
    assert (file.purpose, file.filename) == ("batch_output", f"{row.batch_id}_output.jsonl")
    assert file.expires_at == file.created_at + timedelta(seconds=3600)
    assert gateway.deadlines == {row.expires_at}


def test_the_window_is_kept(gateway: FakeGateway, files: Files, create: Create) -> None:
    """Never more requests under way than the window has room for, and it is filled."""
    create(*(line(f"r-{number}") for number in range(60)))
    seen = []

    def work() -> None:
        waiting = gateway.rows("queued", "running")
        seen.append(len(waiting))
        if len(waiting) >= 10:
            gateway.end(waiting[0])
        elif len(gateway.submitted) == 60:
            gateway.work()

    assert run(gateway.services(files, window=10, group=4), gateway, work).status == "completed"
    assert max(seen) == 10


@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_memory(gateway: FakeGateway, files: Files, database: Database, caller: Caller, batches: Batches) -> None:
    """A batch takes the memory of its window, not of its file; bench/batch_memory.py measures a whole one."""
    pad, lines = "x" * 20_000, 500
    content = jsonl(*(line(f"r-{number}", body={"name": f"r-{number}", "pad": pad}) for number in range(lines)))
    size = len(content)
    batches.create(caller, URL, store(files, database, caller, content))
    del content
    services = gateway.services(files, window=15)
    tracemalloc.start()
    try:
        row = run(services, gateway)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (row.status, row.completed) == ("completed", lines)
    assert peak < size / 2


def test_partial_failures(gateway: FakeGateway, files: Files, create: Create) -> None:
    """Refused, failed and dead lines go to the error file, with the status and the body that the endpoint would answer."""

    def judge(body: Mapping[str, Any]) -> GatewayError | None:
        return UnknownAgent("no such agent", param="model") if body["name"] == "refused" else None

    gateway.judge = judge
    create(line("good"), line("refused"), line("broken"), line("withdrawn"), line("dead"))

    def work() -> None:
        for row in gateway.rows("queued"):
            name = gateway.body(row)["name"]
            ends = {
                "broken": ("failed", "engine_failed"),
                "withdrawn": ("cancelled", "cancelled"),
                "dead": ("dead", "attempts_exhausted"),
            }
            gateway.end(row, *ends.get(name, ("completed", None)))

    row = run(gateway.services(files), gateway, work)
    assert (row.status, row.total, row.completed, row.failed) == ("completed", 5, 1, 3)
    assert [answer["custom_id"] for answer in lines_of(files, row.output_file_id)] == ["good"]
    refused, broken, withdrawn, dead = lines_of(files, row.error_file_id)
    assert dead["response"]["status_code"] == 502
    assert dead["response"]["body"]["error"]["code"] == "attempts_exhausted"
    assert refused["response"]["status_code"] == 404
    assert refused["error"] is None
    assert refused["response"]["body"]["error"]["message"] == "no such agent"
    assert refused["response"]["body"]["error"]["param"] == "model"
    assert broken["response"]["status_code"] == 502
    assert broken["response"]["body"]["error"]["code"] == "engine_failed"
    assert broken["response"]["request_id"].startswith("gw_")
    assert (withdrawn["response"], withdrawn["error"]["code"]) == (None, "batch_cancelled")


@pytest.mark.parametrize("error", [QueueFull, QueueUnavailable, ServiceUnavailable])
def test_backpressure(gateway: FakeGateway, files: Files, create: Create, error: type[ServiceUnavailable]) -> None:
    """A queue that is full or away is waited for; no line fails, and none runs twice."""
    gateway.judge = Busy(5, error)
    create(*(line(f"r-{number}") for number in range(20)))
    services = gateway.services(files)
    services = Services(
        **{name: getattr(services, name) for name in services.__slots__} | {"backoff": Backoff(0.001, 0.002)}
    )
    row = run(services, gateway)
    assert (row.status, row.completed, row.failed) == ("completed", 20, 0)
    assert len(gateway.rows("completed")) == 20


def test_the_queue_lost_between_commit_and_publish(gateway: FakeGateway, files: Files, create: Create) -> None:
    """A request that was admitted and then failed for want of a queue never ran: its line gets another."""
    create(line("a"), line("b"))
    lost = 2

    def work() -> None:
        nonlocal lost
        for row in gateway.rows("queued"):
            lost -= 1
            gateway.end(row, *(("failed", "queue_unavailable") if lost >= 0 else ("completed", None)))

    row = run(gateway.services(files), gateway, work)
    assert (row.status, row.completed, row.failed) == ("completed", 2, 0)


def test_a_bug_in_one_line_is_its_own(
    gateway: FakeGateway, files: Files, create: Create, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error while submitting is tried again a few times, then told in the error file, and logged by kind."""

    def judge(body: Mapping[str, Any]) -> None:
        if body["name"] == "cursed":
            raise KeyError("secret-of-the-prompt")

    gateway.judge = judge
    create(line("a"), line("cursed"), line("b"))
    row = run(gateway.services(files), gateway)
    assert (row.status, row.completed, row.failed) == ("completed", 2, 1)
    [answer] = lines_of(files, row.error_file_id)
    assert answer["response"]["body"]["error"]["code"] == "internal_error"
    assert "KeyError" in caplog.text
    assert "secret-of-the-prompt" not in caplog.text


def test_an_answer_that_cannot_be_read(gateway: FakeGateway, files: Files, create: Create) -> None:
    """One answer that is damaged costs no other."""
    create(line("a"), line("b"))
    render = gateway.render

    def damaged(row: Row[Any]) -> dict[str, Any]:
        if gateway.body(row)["name"] == "a":
            raise ValueError
        return render(row)

    gateway.render = damaged  # type: ignore[method-assign]
    row = run(gateway.services(files), gateway)
    assert (row.status, row.completed, row.failed) == ("completed", 1, 1)
    assert lines_of(files, row.error_file_id)[0]["response"]["status_code"] == 500


def test_refusals_are_told_after_a_takeover(
    gateway: FakeGateway, files: Files, database: Database, create: Create
) -> None:
    """A refusal that was recorded, and whose driver died before it wrote it down, is found in the audit trail."""
    gateway.judge = lambda _body: UnknownAgent()
    create(line("a"))
    claim = claimed(database)
    steps = drive(gateway.services(files, window=0), claim)
    while row_of(database, claim.batch_id).status == "validating":
        next(steps)
    [item] = claim.write(lambda connection: items.take(connection, claim.batch_id, 0, 1))
    row = row_of(database, claim.batch_id)
    with pytest.raises(UnknownAgent):
        gateway.submit(
            Caller(row.api_key_id, row.organization), URL, {}, request_id=item.request_id, deadline=row.expires_at
        )
    gateway.judge = lambda _body: None
    list(drive(gateway.services(files), claim))
    row = row_of(database, claim.batch_id)
    assert (row.status, row.completed, row.failed) == ("completed", 0, 1)
    assert lines_of(files, row.error_file_id)[0]["response"]["body"]["error"]["code"] == "unknown_agent"
    query = sa.select(sa.func.count()).select_from(audit_events).where(audit_events.c.kind == "failed")
    assert database.read(lambda connection: connection.execute(query).scalar()) == 1


def test_a_claim_that_is_lost(gateway: FakeGateway, files: Files, database: Database, create: Create) -> None:
    """The first driver changes nothing any more once another has the batch; a claim that holds is nobody else's."""
    create(line("a"))
    old = claimed(database)
    assert take(database, "other", 30) is None
    old.release()
    new = claimed(database)
    with pytest.raises(ClaimLost):
        old.write(lambda connection: items.clear(connection, old.batch_id))
    with pytest.raises(ClaimLost):
        next(drive(gateway.services(files), old))
    assert new.look().claimed_by == "test"
    query = sa.select(sa.func.count()).select_from(batch_items)
    assert database.read(lambda connection: connection.execute(query).scalar()) == 0


def test_turns_between_organizations(files: Files, database: Database, batches: Batches, caller: Caller) -> None:
    """The first batch of one organization does not wait for the many of another."""
    key_id, _ = ApiKeys(database, (b"pepper",)).create("small", "test")
    small = Caller(key_id, "small")
    for who in (caller, caller, caller, small):
        batches.create(who, URL, store(files, database, who, jsonl(line("a"))))
    rows = [row_of(database, claimed(database).batch_id).organization for _ in range(4)]
    assert rows == ["default", "small", "default", "default"]
