"""`flask cache purge`: erases an organization's KV blocks from the disks of all hosts that workers run on.

Each worker erases on its own host. Where none runs, the disk is this host's at most: a host that is down must be asked again
when it is back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import redis

from gateway_app.commands import check_printable, explained
from tasks.kv_folders import Erased, erase, organization_folders
from tasks.queueing.connecting import connect
from tasks.queueing.heartbeats import workers
from tasks.queueing.keys import QueueKeys
from tasks.settings import settings

if TYPE_CHECKING:
    from celery import Celery

#: How long a worker may take; to remove a file takes some ten microseconds.
ANSWER_S = 60.0
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Purged:
    """What was erased, worker by worker, and which workers did not say that they have."""

    by_worker: dict[str, Erased]
    failed: dict[str, str]


def purge(
    app: Celery, client: redis.Redis, keys: QueueKeys, names: Sequence[str], answer_s: float = ANSWER_S
) -> Purged:
    """Have every live worker erase the folders of these names. Raises redis.RedisError if the queue cannot be asked."""
    alive = sorted(one["worker"] for one in workers(client, keys))
    if not alive:
        return Purged({}, {})
    arguments = {"folders": list(names)}
    # `limit`: when all have answered there is nothing to wait for.
    replies: list[dict[str, Any]] = app.control.broadcast(
        "erase_kv", arguments, destination=alive, reply=True, timeout=answer_s, limit=len(alive)
    )
    said = {worker: answer for reply in replies or () for worker, answer in reply.items()}
    erased = {worker: Erased(**answer["ok"]) for worker, answer in said.items() if "ok" in answer}
    failed = {worker: str(said.get(worker, {}).get("error", "it does not answer")) for worker in alive}
    return Purged(erased, {worker: why for worker, why in failed.items() if worker not in erased})


@click.command("purge")
@click.option("--organization", required=True, help="Whose KV blocks go.")
@explained
def cache_purge(organization: str) -> None:
    """Erase an organization's KV blocks from disk, on this host and on every host that a worker runs on.

    Workers may run meanwhile. First see to it that the organization's requests have ended: what is computed later is
    kept again. What GPUs and host RAM hold goes as other prompts need the room, and when the worker ends.
    """
    # Imported only where it is wanted: other commands need no Celery.
    from tasks.app import make_app

    check_printable(organization, 200, "--organization")
    gateway = settings().gateway
    names = organization_folders(settings().secrets.keys("organization_salt"), organization)
    here = erase(settings().caching.tiers.disk_directory, names)
    click.echo(_line("this host", here))
    with closing(connect(gateway.request_queue_url, gateway.redis_timeout_s, 1)) as client, make_app() as app:
        purged = purge(app, client, QueueKeys(gateway.key_prefix), names)
    for worker, erased in sorted(purged.by_worker.items()):
        click.echo(_line(worker, erased))
    if purged.failed:
        which = "\n".join(f"{worker}: {why}" for worker, why in sorted(purged.failed.items()))
        raise click.ClickException(f"not erased everywhere:\n{which}")


def _line(where: str, erased: Erased) -> str:
    return f"{where}: {erased.files} blocks, {erased.bytes / MIB:,.1f} MiB"
