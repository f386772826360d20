"""Workers and housekeepers: alive, and serving the model that the gateway asks for."""

from __future__ import annotations

from collections.abc import Iterator

import redis

from gateway_app.doctor.connecting import QUEUE_AWAY, redis_client
from gateway_app.doctor.finding import Finding, fail, ok, unknown, warn
from gateway_app.housekeeping.leadership import somebody_leads
from tasks.queueing.heartbeats import workers
from tasks.queueing.keys import QueueKeys
from tasks.settings import Settings

WORKER = "celery -A worker_gpu worker -Q gpu"
HOUSEKEEPER = "celery -A gateway_app.housekeeping worker -Q housekeeping"


def examine(settings: Settings) -> Iterator[Finding]:
    """Ask Redis who lives."""
    keys = QueueKeys(settings.gateway.key_prefix)
    try:
        with redis_client(settings) as client:
            yield _workers(client, keys, settings.engine.model_name)
            yield _housekeeper(client, keys)
            yield _refused(client, keys)
            yield _events(settings)
    except QUEUE_AWAY:
        yield unknown("processes", "workers and housekeepers report through Redis, which cannot be asked")


def _workers(client: redis.Redis, keys: QueueKeys, model: str) -> Finding:
    alive = workers(client, keys)
    if not alive:
        return warn("workers", "none is running: requests wait", WORKER)
    wrong = sorted({f"{one['worker']} ({one['model']})" for one in alive if one["model"] != model})
    if wrong:
        return fail(
            "workers",
            f"the gateway asks for {model}, and {', '.join(wrong)} serve another model",
            "METAQORE_ENGINE__MODEL",
        )
    ready = sum(one["state"] == "ready" for one in alive)
    if not ready:
        states = ", ".join(sorted({one["state"] for one in alive}))
        return warn("workers", f"{len(alive)} run, and none is ready: {states}", "look at the workers' logs")
    return ok("workers", f"{ready} of {len(alive)} ready, serving {model}")


def _housekeeper(client: redis.Redis, keys: QueueKeys) -> Finding:
    if somebody_leads(client, keys.prefix):
        return ok("housekeeper", "one leads")
    return warn("housekeeper", "none is running: what Redis loses waits until one is", HOUSEKEEPER)


def _refused(client: redis.Redis, keys: QueueKeys) -> Finding:
    count = client.llen(keys.named("refused"))
    if not count:
        return ok("refused messages", "none")
    return warn(
        "refused messages",
        f"workers set {count} message{'s' if count > 1 else ''} aside that no gateway with their secrets wrote",
        "look for `refused` in the workers' logs, and at the findings about secrets",
    )


def _events(settings: Settings) -> Finding:
    if settings.flower.events:
        return ok("events", "on: each request costs some more, and Flower shows it as it happens")
    return ok("events", "off: Flower shows workers, and no requests")
