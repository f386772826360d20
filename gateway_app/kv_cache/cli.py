"""`flask cache`: what the workers' KV caches hold, of all organizations."""

from __future__ import annotations

import json
from contextlib import closing

import click

from gateway_app.commands import explained
from gateway_app.kv_cache import documents, showing
from gateway_app.kv_cache.purging import cache_purge
from gateway_app.kv_cache.view import CacheView
from tasks.db import Database
from tasks.queueing.connecting import connect
from tasks.queueing.keys import QueueKeys
from tasks.settings import settings


@click.group()
def cache() -> None:
    """Look at the workers' KV caches, and erase from their disks."""


cache.add_command(cache_purge)


@cache.command("show")
@click.option("--worker", help="Only what this worker holds.")
@click.option("--organization", help="Only this organization's profiles.")
@click.option("--agent", help="Only agents of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@explained
def cache_show(worker: str | None, organization: str | None, agent: str | None, *, as_json: bool) -> None:
    """Show which worker holds what of which profile, and how often requests found it there.

    \b
    flask cache show
    flask cache show --agent incident-responder --json
    """  # noqa: D301  the backslash is click's
    gateway = settings().gateway
    client = connect(gateway.request_queue_url, gateway.redis_timeout_s, 1)
    with closing(Database(settings().database)) as database, closing(client):
        seen = CacheView(database, client, QueueKeys(gateway.key_prefix)).of_fleet(worker, organization, agent)
    if as_json:
        click.echo(json.dumps(documents.of_fleet(seen), indent=1))
        return
    for line in showing.lines(seen):
        click.echo(line)
