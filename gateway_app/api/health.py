"""Health: `/healthz` says that the process answers, `/readyz` what it is missing."""

from __future__ import annotations

from collections.abc import Callable

import redis
from flask import Blueprint, Response, jsonify

from gateway_app.housekeeping.leadership import somebody_leads
from tasks.db import Database
from tasks.errors import GatewayError
from tasks.migrating import pending_migrations
from tasks.queueing.heartbeats import workers
from tasks.queueing.keys import QueueKeys
from tasks.queueing.publisher import Publisher

#: Without one of these a request cannot be taken; without a worker it waits in the queue, without a housekeeper it may
#: wait for ever after Redis has lost it.
_REQUIRED = ("database", "queue")
#: How full the queue may be before new requests had better go elsewhere.
NEARLY_FULL = 0.9


def blueprint(database: Database, publisher: Publisher, client: redis.Redis, keys: QueueKeys) -> Blueprint:
    """Return the routes, over what they look at."""
    health = Blueprint("health", __name__)

    @health.get("/healthz")
    def alive() -> Response:
        return jsonify(status="ok")

    @health.get("/readyz")
    def ready() -> tuple[Response, int]:
        checks = {
            "database": _check(lambda: _migrated(database)),
            "queue": _check(lambda: _room(publisher)),
            "worker": _check(lambda: _any_worker(client, keys)),
            "housekeeper": _check(lambda: _any_housekeeper(client, keys)),
        }
        missing = [name for name, problem in checks.items() if problem]
        refused = any(name in missing for name in _REQUIRED)
        status = "ready" if not missing else "unavailable" if refused else "degraded"
        answer = jsonify(status=status, missing=missing, checks={name: text or "ok" for name, text in checks.items()})
        return answer, 503 if refused else 200

    return health


def _check(look: Callable[[], str | None]) -> str | None:
    """Return what is wrong, or None."""
    try:
        return look()
    except GatewayError as error:
        return error.detail


def _migrated(database: Database) -> str | None:
    pending = database.read(pending_migrations)
    return f"migrations {', '.join(pending)} are pending; run `flask db upgrade`" if pending else None


def _room(publisher: Publisher) -> str | None:
    # Asked as a request asks: a Redis that takes no writes takes no requests.
    publisher.room("", 0)
    load = publisher.load()
    return f"nearly full: {load.share:.0%} of what may wait" if load.share >= NEARLY_FULL else None


def _any_housekeeper(client: redis.Redis, keys: QueueKeys) -> str | None:
    try:
        leads = somebody_leads(client, keys.prefix)
    except redis.RedisError:
        return "housekeepers report through the queue, which cannot be reached"
    command = "celery -A gateway_app.housekeeping worker -Q housekeeping"
    return None if leads else f"no housekeeper is running; start `{command}`"


def _any_worker(client: redis.Redis, keys: QueueKeys) -> str | None:
    try:
        states = [state["state"] for state in workers(client, keys)]
    except redis.RedisError:
        return "workers report through the queue, which cannot be reached"
    if "ready" in states:
        return None
    return "a GPU worker is loading its model" if states else "no GPU worker is running; start `celery worker -Q gpu`"
