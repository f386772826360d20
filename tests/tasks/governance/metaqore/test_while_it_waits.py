"""A project that changes while a request waits, and a MetaQore that is away then: a worker asks again, before the
engine sees the request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis
import requests
import sqlalchemy as sa

from tasks.db import Database
from tasks.queueing.keys import QueueKeys
from tasks.schema import TERMINAL_STATES, audit_events
from tasks.settings import settings
from tests.metaqore_stand_in import StandIn
from tests.services import wait_until
from tests.serving import serve
from tests.workers import Worker


@pytest.mark.parametrize("database_kind", ["sqlite"], indirect=True)
def test_a_project_that_is_blocked_meanwhile_stops_what_waits(
    configured: None, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its request is refused and recorded; that of another project runs, although they were admitted alike. MetaQore is
    away when the worker comes, and nothing is lost for that: they wait in the queue, and one that is cancelled leaves it.
    """
    monkeypatch.setenv("METAQORE_URL", stand_in.url)
    for name, value in {"CACHE_S": "0", "FAILURE_CACHE_S": "0", "BREAKER_FAILURES": "1000"}.items():
        monkeypatch.setenv(f"METAQORE_METAQORE__{name}", value)
    monkeypatch.setenv("METAQORE_ENGINE__OPTIONS", '{"time_scale": 0}')
    settings.cache_clear()
    going_on, stopping = stand_in.add(2), stand_in.add(3, "planning")
    database, worker = Database(settings().database), Worker(tmp_path / "worker.log")
    queue, keys = redis.Redis.from_url(settings().gateway.request_queue_url), QueueKeys(settings().gateway.key_prefix)
    with serve() as served:

        def submit(project: str) -> str:
            task = {"agent": "incident-responder", "directive": "Go on.", "project_id": project}
            answer = requests.post(f"{served.url}/v1/tasks", json=task, headers=served.headers, timeout=10)
            assert answer.status_code == 202, answer.text
            return str(answer.json()["id"])

        def task(request_id: str) -> Any:
            return requests.get(f"{served.url}/v1/tasks/{request_id}", headers=served.headers, timeout=10).json()

        runs, stops, given_up = submit(going_on), submit(stopping), submit(going_on)
        stand_in.add(3, "blocked")
        stand_in.fail("503")
        stand_in.calls.clear()
        worker.start()
        try:
            wait_until(lambda: len(stand_in.calls) >= 6 * 4, 60, "the worker to ask again and again")
            wait_until(lambda: queue.zcard(keys.named("delayed")) == 3, 60, "them to wait in the queue")
            assert [task(one)["status"] for one in (runs, stops, given_up)] == ["queued"] * 3
            requests.delete(f"{served.url}/v1/tasks/{given_up}", headers=served.headers, timeout=10)
            assert task(given_up)["status"] == "cancelled"
            wait_until(lambda: queue.hlen(keys.named("messages")) == 2, 20, "it to be out of the queue")
            stand_in.fail(None)
            wait_until(lambda: all(task(one)["status"] in TERMINAL_STATES for one in (runs, stops)), 60, "both ends")
        finally:
            worker.stop()
            queue.close()
        assert task(runs)["status"] == "completed"
        assert (task(stops)["status"], task(stops)["error"]["code"]) == ("failed", "policy_veto")
    query = sa.select(audit_events).where(audit_events.c.request_id == stops).order_by(audit_events.c.occurred_at)
    events = {event.kind: event for event in database.read(lambda connection: connection.execute(query).all())}
    database.close()
    assert set(events) == {"received", "admitted", "vetoed"}, "the engine has not seen it"
    assert events["admitted"].details["psmp"]["project"] == {"id": stopping, "status": "planning"}
    vetoed = events["vetoed"]
    assert vetoed.details["psmp"]["project"] == {"id": stopping, "status": "blocked"}
    assert vetoed.details["veto"]["policy_violated"] == "psmp_project_blocked"
    assert vetoed.reason == f"Project '{stopping}' is blocked"
