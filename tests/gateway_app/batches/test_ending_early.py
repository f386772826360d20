"""Batches that are cancelled, expire, or lose their key: nothing more is begun, and what is said of it is true."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from gateway_app.batches import items
from gateway_app.batches.batches import Batches
from gateway_app.batches.driver import drive
from gateway_app.batches.files import Files
from gateway_app.governance.api_keys import ApiKeys, Caller
from tasks.db import Database, now
from tasks.errors import (
    AlreadyFinished,
    GatewayError,
    NotFound,
    ServiceUnavailable,
)
from tasks.schema_batches import batches as batches_table
from tests.gateway_app.batches.driving import Create, claimed, lines_of, row_of, run
from tests.gateway_app.batches.fakes import URL, FakeGateway, jsonl, line, store


def test_cancel(
    gateway: FakeGateway,
    files: Files,
    batches: Batches,
    create: Create,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is submitted any more, what runs is told to stop, and what was done is kept."""
    monkeypatch.setattr(items, "_SLICE", 7)
    created = create(*(line(f"r-{number}") for number in range(30)))
    services = gateway.services(files, window=10, group=10)
    steps = drive(services, claimed(services.database))
    while len(gateway.rows("queued")) < 10:
        next(steps)
    done, running, *_ = gateway.rows("queued")
    gateway.end(done)
    gateway.start(running)
    row = batches.cancel(created.batch_id, "default")
    assert (row.status, batches.cancel(created.batch_id, "default").status) == ("cancelling", "cancelling")
    for _ in range(20):
        next(steps)
    assert gateway.stopping == [running.request_id]
    assert row_of(services.database, created.batch_id).status == "cancelling"
    gateway.end(gateway.rows("running")[0], "cancelled", "cancelled")
    assert list(steps) is not None
    row = row_of(services.database, created.batch_id)
    assert (row.status, row.total, row.completed, row.failed) == ("cancelled", 30, 1, 0)
    assert row.cancelling_at <= row.ended_at
    assert len(lines_of(files, row.output_file_id)) == 1
    errors = lines_of(files, row.error_file_id)
    assert len(errors) == 29
    assert {answer["error"]["code"] for answer in errors} == {"batch_cancelled"}
    assert len(gateway.submitted) == 10
    assert batches.cancel(created.batch_id, "default").status == "cancelled"


def test_cancel_at_once(gateway: FakeGateway, files: Files, batches: Batches, create: Create) -> None:
    """A batch that is cancelled before it runs is cancelled without files."""
    created = create(line("a"))
    batches.cancel(created.batch_id, "default")
    row = run(gateway.services(files), gateway)
    assert (row.status, row.total, row.output_file_id, row.error_file_id) == ("cancelled", 0, None, None)
    assert not gateway.submitted


def test_cancel_what_cannot_be(gateway: FakeGateway, files: Files, batches: Batches, create: Create) -> None:
    """A batch that has ended, and one that is not the caller's or was never made."""
    created = create(line("a"))
    run(gateway.services(files), gateway)
    with pytest.raises(AlreadyFinished):
        batches.cancel(created.batch_id, "default")
    for batch_id, organization in ((created.batch_id, "other"), ("batch_" + "0" * 32, "default"), ("x\x00", "default")):
        with pytest.raises(NotFound):
            batches.cancel(batch_id, organization)
        with pytest.raises(NotFound):
            batches.find(batch_id, organization)


def test_a_worker_that_never_stops(gateway: FakeGateway, files: Files, batches: Batches, create: Create) -> None:
    """After the time of grace the batch ends without it."""
    created = create(line("a"))
    services = gateway.services(files, grace_s=0.0)
    steps = drive(services, claimed(services.database))
    while not gateway.rows("queued"):
        next(steps)
    gateway.start(gateway.rows("queued")[0])
    batches.cancel(created.batch_id, "default")
    list(steps)
    row = row_of(services.database, created.batch_id)
    assert (row.status, row.completed) == ("cancelled", 0)
    assert len(lines_of(files, row.error_file_id)) == 1


def test_expiry(gateway: FakeGateway, files: Files, database: Database, caller: Caller, keys: Any) -> None:
    """When the window has passed, what is done is answered and the rest is reported as expired."""
    batches = Batches(database, keys, window=timedelta(hours=1))
    content = jsonl(*(line(f"r-{number}") for number in range(30)))
    created = batches.create(caller, URL, store(files, database, caller, content))
    services = gateway.services(files, window=10, group=10)
    steps = drive(services, claimed(database))
    while len(gateway.rows("queued")) < 10:
        next(steps)
    gateway.end(gateway.rows("queued")[0])
    gateway.end(gateway.rows("queued")[0], "expired", "expired")
    past = sa.update(batches_table).values(expires_at=now() - timedelta(seconds=1))
    database.write(lambda connection: connection.execute(past) and None)
    list(steps)
    row = row_of(database, created.batch_id)
    assert (row.status, row.total, row.completed, row.failed) == ("expired", 30, 1, 0)
    assert len(lines_of(files, row.output_file_id)) == 1
    errors = lines_of(files, row.error_file_id)
    assert len(errors) == 29
    assert {answer["error"]["code"] for answer in errors} == {"batch_expired"}
    assert not gateway.rows("queued", "running")


def test_a_revoked_key(gateway: FakeGateway, files: Files, database: Database, caller: Caller, create: Create) -> None:
    """What runs may end; nothing more is submitted in the name of a key that is no longer one."""
    create(*(line(f"r-{number}") for number in range(30)))
    services = gateway.services(files, window=10, group=10)
    claim = claimed(database)
    steps = drive(services, claim)
    while len(gateway.rows("queued")) < 10:
        next(steps)
    ApiKeys(database, (b"pepper",)).revoke(caller.key_id)
    for _ in steps:
        gateway.work()
    row = row_of(database, claim.batch_id)
    assert (row.status, row.total, row.completed, row.failed) == ("completed", 30, 10, 20)
    errors = lines_of(files, row.error_file_id)
    assert {answer["response"]["body"]["error"]["code"] for answer in errors} == {"unauthenticated"}
    assert {answer["response"]["status_code"] for answer in errors} == {401}
    assert len(gateway.submitted) == 10


def test_an_admission_that_comes_too_late_is_refused(
    gateway: FakeGateway,
    files: Files,
    database: Database,
    batches: Batches,
    create: Create,
    caller: Caller,
) -> None:
    """A driver that was given up for dead may still be about to submit; once its line has ended, it cannot."""
    created = create(line("a"), line("b"))
    services = gateway.services(files, window=0)
    claim = claimed(database)
    steps = drive(services, claim)
    while row_of(database, claim.batch_id).status == "validating":
        next(steps)
    lost = claim.write(lambda connection: items.take(connection, claim.batch_id, 0, 2))
    batches.cancel(created.batch_id, "default")
    list(drive(services, claim))
    row = row_of(database, created.batch_id)
    assert row.status == "cancelled"
    for item in lost:
        with pytest.raises(sa.exc.IntegrityError):
            gateway.submit(caller, URL, {"name": "late"}, request_id=item.request_id, deadline=now())
    assert not gateway.rows("queued")


def test_a_request_that_is_admitted_while_its_batch_ends(
    gateway: FakeGateway,
    files: Files,
    database: Database,
    batches: Batches,
    create: Create,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not reported as never run, but cancelled, also if that does not work at once."""
    created = create(line("a"), line("b"))
    errors: list[type[GatewayError]] = [ServiceUnavailable, AlreadyFinished]
    cancel = gateway.cancel

    def failing(request_id: str, organization: str) -> None:
        if errors:
            raise errors.pop(0)
        cancel(request_id, organization)

    gateway.cancel = failing  # type: ignore[method-assign]
    steps = drive(gateway.services(files), claimed(database))
    while len(gateway.rows("queued")) < 2:
        next(steps)
    batches.cancel(created.batch_id, "default")
    known, blind = items.outcomes, [True, True]
    monkeypatch.setattr(items, "outcomes", lambda *given: {} if blind and blind.pop() else known(*given))
    for _ in range(6):
        next(steps, None)
    for row in gateway.rows("queued"):
        gateway.end(row)
    list(steps)
    row = row_of(database, created.batch_id)
    assert (row.status, blind, errors) == ("cancelled", [], [])
    ran = {gateway.body(request)["name"] for request in gateway.rows("completed")}
    assert {answer["custom_id"] for answer in lines_of(files, row.output_file_id)} == ran
    assert len(ran) == row.completed == 1
