"""A gateway without HTTP, and workers of it that are real processes: for tests of how workers end."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa
from celery import Celery
from flask.testing import FlaskClient

from gateway_app import build
from tasks.app import make_app
from tasks.db import Database
from tasks.queueing.heartbeats import workers
from tasks.queueing.keys import QueueKeys
from tasks.schema import TERMINAL_KINDS, TERMINAL_STATES, audit_events, requests
from tasks.settings import PREFIX, settings
from tests.conftest import new_key
from tests.services import wait_until
from tests.workers import Worker

READY_S = 60.0
END_S = 20.0


@dataclass
class Site:
    """A gateway, its services, and the workers that were started."""

    folder: Path
    client: FlaskClient
    database: Database
    redis: redis.Redis
    keys: QueueKeys
    celery: Celery
    started: list[Worker] = field(default_factory=list)

    def start(self, name: str, *, options: dict[str, Any] | None = None, **variables: str) -> Worker:
        """Start a worker; `options` are its engine's, `variables` settings of its own without prefix."""
        named = {f"{PREFIX}{key}": value for key, value in variables.items()}
        if options is not None:
            named[f"{PREFIX}ENGINE__OPTIONS"] = json.dumps(options)
        worker = Worker(self.folder / f"{name}.log", f"{name}@test", **named)
        self.started.append(worker)
        worker.start()
        return worker

    def kill(self) -> None:
        """Kill every worker that is left."""
        for worker in self.started:
            worker.kill()

    def states(self) -> dict[str, str]:
        """Return what each live worker says of its state, by its name."""
        return {one["worker"].partition("@")[0]: one["state"] for one in workers(self.redis, self.keys)}

    def wait_until_ready(self, *names: str) -> None:
        """Return once all of them take requests."""
        wait_until(
            lambda: all(self.states().get(name) == "ready" for name in names),
            READY_S,
            f"{', '.join(names)} to be ready",
        )

    def submit(self, directive: str, **sampling: Any) -> str:
        """Return a new task's id."""
        task = {"agent": "incident-responder", "directive": directive, "sampling": {"seed": 1, **sampling}}
        answer = self.client.post("/v1/tasks", json=task)
        assert answer.status_code == 202, answer.text
        return str(answer.get_json()["id"])

    def rows(self, *ids: str) -> list[sa.Row[Any]]:
        """Return the rows of requests, in their order."""
        query = sa.select(requests).where(requests.c.request_id.in_(ids))
        found = {row.request_id: row for row in self.database.read(lambda on: on.execute(query).all())}
        return [found[one] for one in ids]

    def wait_for_states(self, ids: list[str], *states: str) -> None:
        """Return once all of the requests are in one of these states."""
        wait_until(lambda: all(row.state in states for row in self.rows(*ids)), END_S, f"{len(ids)} to be {states}")

    def check_ends(self, ids: list[str], state: str = "completed") -> None:
        """Wait until all have ended; check that each did as `state`, exactly once, and that no message is left."""
        self.wait_for_states(ids, *TERMINAL_STATES)
        rows = self.rows(*ids)
        assert Counter(row.state for row in rows) == {state: len(ids)}
        query = sa.select(audit_events.c.request_id, sa.func.count())
        query = query.where(audit_events.c.request_id.in_(ids), audit_events.c.kind.in_(TERMINAL_KINDS))
        counted = self.database.read(lambda on: on.execute(query.group_by(audit_events.c.request_id)).all())
        assert {tuple(row) for row in counted} == {(one, 1) for one in ids}
        tags = [f"{row.request_id}:{row.epoch}" for row in rows]
        wait_until(
            lambda: not any(self.redis.hmget(self.keys.named("messages"), tags)), END_S, "messages to be dropped"
        )

    def kinds(self, request_id: str) -> list[tuple[str, str | None]]:
        """Return the kind and code of a request's events, in their order."""
        query = sa.select(audit_events.c.kind, audit_events.c.code).where(audit_events.c.request_id == request_id)
        found = self.database.read(lambda on: on.execute(query.order_by(audit_events.c.occurred_at)).all())
        return [(kind, code) for kind, code in found]

    def texts(self, request_id: str) -> tuple[str, str]:
        """Return a task's answer as its result says it, and as the last attempt in its stream does."""
        task = self.client.get(f"/v1/tasks/{request_id}").get_json()
        stream = self.client.get(f"/v1/tasks/{request_id}/events").text
        last = re.split(r"event: (?:started|reset)\n", stream)[-1]
        said = re.findall(r"event: delta\ndata: (.*)\n", last)
        return task["result"]["text"], "".join(json.loads(data)["text"] for data in said)

    @property
    def log(self) -> str:
        """Return what all workers have logged."""
        return "".join(worker.log.read_text("utf-8", "replace") for worker in self.started)


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """Return a site on the configured services; its workers end with it."""
    app = build(settings())
    client = app.test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer {new_key('default')}"
    url = settings().gateway.request_queue_url
    database = Database(settings().database)
    with ExitStack() as stack, redis.Redis.from_url(url) as connection:
        stack.callback(app.extensions["closing"].close)
        stack.callback(database.close)
        celery = stack.enter_context(make_app())
        made = Site(folder, client, database, connection, QueueKeys(settings().gateway.key_prefix), celery)
        stack.callback(made.kill)
        yield made
