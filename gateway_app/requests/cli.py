"""`flask requests`: list, show, explain and retry. Each explains itself with `--help`."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import datetime
from typing import Any, get_args

import click
import redis
from sqlalchemy.engine import Row

from gateway_app import parts
from gateway_app.commands import explained
from gateway_app.requests import reading
from gateway_app.requests.explain import Attempt, Replayed, attempts, replay
from gateway_app.requests.explain_text import lines
from gateway_app.requests.retrying import retry
from tasks.db import Database
from tasks.queueing.connecting import connect
from tasks.queueing.keys import QueueKeys
from tasks.queueing.pull import Strategy
from tasks.queueing.scripts import Scripts
from tasks.schema import STATES
from tasks.settings import Settings, settings

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def requests() -> None:
    """Show what became of requests, and send dead ones again."""


@requests.command("list")
@click.option("--state", type=click.Choice(STATES), help="Left out, all states.")
@click.option("--organization", help="Whose requests; left out, everybody's.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="How many, at most.")
@_JSON
@explained
def requests_list(state: str | None, organization: str | None, limit: int, *, as_json: bool) -> None:
    """List requests, the newest first.

    \b
    flask requests list --state dead
    flask requests list --state queued --organization acme --json
    """  # noqa: D301  the backslash is click's
    with closing(Database(settings().database)) as database:
        rows = database.read(lambda connection: reading.page(connection, state, organization, limit))
    if as_json:
        click.echo(json.dumps([_plain(row._mapping) for row in rows], indent=1))  # noqa: SLF001  SQLAlchemy's name for it
        return
    for row in rows:
        click.echo(_line(row))


@requests.command("show")
@click.argument("request_id")
@_JSON
@explained
def requests_show(request_id: str, *, as_json: bool) -> None:
    """Show a request and its events, without its text."""
    with closing(Database(settings().database)) as database:
        row = _found(database, request_id)
        events = database.read(lambda connection: reading.events(connection, request_id))
    shown = {name: getattr(row, name) for name in reading.REQUEST}
    if as_json:
        click.echo(json.dumps({**_plain(shown), "events": [_plain(event) for event in events]}, indent=1))
        return
    for name, value in _plain(shown).items():
        if value is not None:
            click.echo(f"{name:<15}{_safe(value)}")
    for event in events:
        known = {name: value for name, value in _plain(event).items() if value is not None}
        at, kind = known.pop("occurred_at"), known.pop("kind")
        click.echo(f"{at}  {kind:<10} " + "  ".join(f"{name} {_safe(value)}" for name, value in known.items()))


@requests.command("explain")
@click.argument("request_id")
@click.option(
    "--replay", "strategy", type=click.Choice(get_args(Strategy)), help="Ask another strategy about the same decisions."
)
@_JSON
@explained
def requests_explain(request_id: str, strategy: Strategy | None, *, as_json: bool) -> None:
    """Say why a request ran where it did: what else waited, what each would have cost, and what was found.

    What --replay says is of the candidates that were recorded, six at most and of the request's organization.
    """
    options = settings()
    with closing(Database(options.database)) as database:
        row = _found(database, request_id)
        found = attempts(database, request_id, row.organization)
    replays = _replays(options, found, strategy) if strategy is not None else {}
    if as_json:
        documents = [each.document(replays.get(each.number)) for each in found]
        click.echo(json.dumps({"request_id": request_id, "state": row.state, "attempts": documents}, indent=1))
        return
    click.echo(f"{request_id} is {row.state}")
    for each in found:
        click.echo()
        for line in lines(each, replays.get(each.number)):
            click.echo(_safe(line))


@requests.command("retry")
@click.argument("request_id")
@explained
def requests_retry(request_id: str) -> None:
    """Send a dead request again, as a new one; print the new one's id.

    It is sent for the same API key and governed by what is in force now; a deadline that has passed is left out. The dead
    request stays as it is. Asked again within a day, this sends nothing and prints the same id.
    """
    with closing(Database(settings().database)) as database:
        row = _found(database, request_id)
    if row.state != "dead":
        raise click.ClickException(f"{request_id} is {row.state}; only a dead request is sent again")
    if row.payload is None:
        raise click.ClickException(f"the content of {request_id} was erased")
    made = parts.make(settings())
    with made.closing:
        accepted = retry(made.pipeline, row)
    if accepted.repeated:
        click.echo(f"{request_id} was already sent again", err=True)
    click.echo(accepted.request_id)


def _replays(options: Settings, found: list[Attempt], strategy: Strategy) -> dict[int, Replayed]:
    """Return what a strategy makes of each attempt's decision, by the attempt's number."""
    gateway = options.gateway
    try:
        with connect(gateway.request_queue_url, gateway.redis_timeout_s, 1) as client:
            scripts = Scripts(client, QueueKeys(gateway.key_prefix), strategy)
            return {
                each.number: replay(scripts, each.decision, strategy) for each in found if each.decision is not None
            }
    except redis.RedisError as error:
        raise click.ClickException(f"Redis, where strategies run, gave no answer: {type(error).__name__}") from None


def _found(database: Database, request_id: str) -> Row[Any]:
    row = database.read(lambda connection: reading.find(connection, request_id))
    if row is None:
        raise click.ClickException(f"no request has the id {request_id}; `flask requests list` shows them")
    return row


def _line(row: Row[Any]) -> str:
    code = f"  {row.error_code}" if row.error_code else ""
    made = f"{row.created_at:%Y-%m-%d %H:%M:%S}Z"
    return f"{row.request_id}  {row.state:<9}  {made}  {_safe(row.organization)}  attempt {row.attempt}{code}"


def _safe(value: object) -> str:
    """Return a value as text that says nothing to the terminal: callers chose some of the names."""
    return ascii(str(value))[1:-1]


def _plain(columns: Any) -> dict[str, Any]:
    """Return columns as JSON has them."""
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in dict(columns).items()}
