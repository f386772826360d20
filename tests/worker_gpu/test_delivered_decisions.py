"""A decision's way from the queue's message into the record: as it is, if it is one about this request, or not at all."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from tasks.queueing.decision import Decision, read
from tasks.queueing.keys import TASK_NAME
from tasks.queueing.qos import OURS
from tasks.schema import audit_events
from tests.worker_gpu.scripted import Message, Worker, with_worker
from worker_gpu import delivery

PROFILE = "ab" * 32


def text(profile: str = PROFILE, **facts: Any) -> bytes:
    """Return a decision as the queue writes it, of which 96 tokens of 128 should be cached."""
    candidate = {
        "profile": profile, "turn": 1.5, "waiting": 1, "waited": 0, "cached": 96, "static": 128, "seconds": 0.1, "copies": 0
    }  # fmt: skip
    worker = {
        "room": 1,
        "budget": 1,
        "in_flight": 0,
        "load": 0,
        "free_tokens": 0,
        "prefill_rate": 1,
        "affinity": 1,
        "patience": 1,
    }
    told = {
        "strategy": "fifo", "worker": "gpu@test", "at": 2.5, "batch": 1, "chosen": 0, "candidates": [candidate],
        "worker_facts": worker, **facts,
    }  # fmt: skip
    return json.dumps(told).encode()


def message(decision: bytes, **envelope: Any) -> Any:
    """Return a message as Celery's consumer gets it."""
    properties = {"record": b"record", "returns": 2, "decision": decision}
    return SimpleNamespace(
        delivery_tag=f"{OURS}gw_1:1",
        headers={"task": TASK_NAME},
        properties=properties,
        decode=lambda: [[envelope], {}, {}],
    )


def test_a_delivery_tells_what_is_to_be_computed() -> None:
    """As far as it is known: of a decision that cannot be read, or of a length that is none, nothing is."""
    found = delivery.read(message(text(), tokens=150))
    assert (found.tag, found.record, found.came_back) == ("gw_1:1", b"record", 2)
    assert (found.prompt_tokens, found.cached_tokens) == (150, 96)
    for bad in (b"", b"{", b'{"strategy": "fifo"}', text(chosen=3)):
        found = delivery.read(message(bad, tokens=150))
        assert (found.decision, found.prompt_tokens, found.cached_tokens) == (None, 150, 0)
    for tokens in ("150", -1, None, 1e300, 10**30, [1]):
        assert delivery.read(message(text(), tokens=tokens)).prompt_tokens == 0
    assert delivery.read(message(text())).prompt_tokens == 0


def details(worker: Worker, one: Message) -> Any:
    """Return the details of the request's `started` event."""
    query = sa.select(audit_events.c.details).where(
        audit_events.c.request_id == one.job.request_id, audit_events.c.kind == "started"
    )
    return worker.database.read(lambda on: on.execute(query).scalar_one())


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize("database_kind", ["sqlite", "postgresql"], indirect=True)
def test_it_is_recorded_with_the_attempt() -> None:
    """Unless it is about another profile, which may be another organization's. The first token is told once."""

    async def work(worker: Worker) -> None:
        decisions: list[Decision | None] = [read(text()), read(text("cd" * 32)), None]
        for decision in decisions:
            one = worker.message()
            one.decision = decision
            assert await worker.run(one) == "completed"
            worker.check_end(one, "completed", None)
            kept = decision if decision is not None and decision is decisions[0] else None
            assert details(worker, one) == (None if kept is None else {"schedule": kept.record()})
            assert [delta.output_tokens for delta in one.progress.begun] == [1]

    with_worker(work)
