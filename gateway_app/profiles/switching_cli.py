"""`flask profiles activate`, `rollback`, `canary`, `promote`, `pin`, `unpin`, `pins`: what requests get, and what is kept warm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from pydantic import BaseModel, ValidationError

from gateway_app import parts
from gateway_app.commands import check_printable, explained
from gateway_app.governance.api_keys import Caller
from gateway_app.profiles.drafts import ActivateVersion, Because, NewCanary, NewPin, Promotion, RollBack
from gateway_app.profiles.management import ProfileManagement, manage
from gateway_app.profiles.pins import Pinned
from gateway_app.profiles.switching import Activated
from gateway_app.profiles.warming import Warmth
from gateway_app.profiles.wishes import Wishes
from tasks.settings import settings

M = TypeVar("M", bound=BaseModel)
#: Who makes changes here, in place of an API key.
_AUTHOR = "cli"
_WHY = {
    "off": "nothing was computed beforehand, as was asked for",
    "nothing_to_cache": "the profile is encoded whole with each request, so nothing can be computed beforehand",
    "abstract": "the agent is abstract, so no request asks for it",
    "no_worker": "no worker is alive, so the first requests wait until it is computed",
    "queue_unavailable": "Redis gave no answer, so the first requests may wait until it is computed",
    "many_waiting": "many versions are being computed at this moment, so this one was not waited for",
    "not_in_time": "the time was over before it was computed everywhere",
}


def _organization(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--organization", default="default", show_default=True, help="Whose agent.")(command)


def _because(command: Callable[..., None]) -> Callable[..., None]:
    author = click.option("--author", help="Whoever decided it, for the record.")
    return author(click.option("--reason", help="One line for those who read the record.")(_organization(command)))


def _warmed(command: Callable[..., None]) -> Callable[..., None]:
    longest = click.option(
        "--warm-s",
        type=float,
        help="Seconds to wait until workers have computed it; 0: none do. Default: profiles.warm_s.",
    )
    return longest(_because(command))


@click.command("activate")
@click.argument("agent")
@click.argument("version", type=int)
@_warmed
@explained
def activate(agent: str, organization: str, **said: Any) -> None:
    """Make VERSION of AGENT the one that requests get, once workers have computed it."""
    caller, wanted = _caller(organization), _read(ActivateVersion, said)
    with _management() as management:
        _tell(agent, management.switch.activate(caller, agent, wanted))


@click.command("rollback")
@click.argument("agent")
@click.option("--version", type=int, help="Left out, the one that was active before.")
@_warmed
@explained
def roll_back(agent: str, organization: str, **said: Any) -> None:
    """Make the version of AGENT active again that was so before, once workers have computed it."""
    caller, wanted = _caller(organization), _read(RollBack, said)
    with _management() as management:
        _tell(agent, management.switch.roll_back(caller, agent, wanted))


@click.command("canary")
@click.argument("agent")
@click.argument("version", type=int)
@click.option("--share", type=float, required=True, help="Of the agent's requests, from 0 to 1.")
@_warmed
@explained
def canary(agent: str, organization: str, **said: Any) -> None:
    """Run VERSION of AGENT beside the active one, once workers have computed it."""
    caller, wanted = _caller(organization), _read(NewCanary, said)
    with _management() as management:
        warmth = management.switch.set_canary(caller, agent, wanted)
        click.echo(f"{agent}: version {wanted.version} gets {wanted.share:.0%} of the requests; {_told(warmth)}")


@click.command("promote")
@click.argument("agent")
@_warmed
@explained
def promote(agent: str, organization: str, **said: Any) -> None:
    """Make the canary of AGENT the active version."""
    caller, wanted = _caller(organization), _read(Promotion, said)
    with _management() as management:
        _tell(agent, management.switch.promote_canary(caller, agent, wanted))


@click.command("pin")
@click.argument("agent")
@click.option("--copies", type=int, default=1, show_default=True, help="Workers that keep it computed.")
@_because
@explained
def pin(agent: str, organization: str, **said: Any) -> None:
    """Keep the active version of AGENT computed: workers compute it now, and again whenever it is lost."""
    caller, wanted = _caller(organization), _read(NewPin, said)
    with _management() as management:
        _tell_pin(agent, management.pins.pin(caller, agent, wanted))


@click.command("unpin")
@click.argument("agent")
@_because
@explained
def unpin(agent: str, organization: str, **said: Any) -> None:
    """Stop keeping AGENT computed. What is computed stays until others need the room."""
    caller, why = _caller(organization), _read(Because, said)
    with _management() as management:
        _tell_pin(agent, management.pins.unpin(caller, agent, why))


@click.command("pins")
@_organization
@explained
def pins(organization: str) -> None:
    """List the pinned agents, and where they are computed."""
    _caller(organization)
    with _management() as management:
        for agent in management.pins.agents(organization):
            _tell_pin(agent, management.pins.show(organization, agent))


@contextmanager
def _management() -> Iterator[ProfileManagement]:
    options = settings()
    made = parts.make(options)
    with made.closing:
        wishes = Wishes(made.client, made.queue_keys) if options.caching.keeps_prefixes else None
        window = made.pipeline.context_window
        yield manage(made.profiles, made.database, made.wrapper, window, options.profiles, wishes, _Progress())


class _Progress:
    """Says how far it is, whenever that has changed."""

    def __init__(self) -> None:
        self._said = ""

    def __call__(self, warmth: Warmth) -> None:
        wanted = min(warmth.copies, warmth.alive)
        line = f"computed on {len(warmth.workers)} of {wanted}, being computed on {len(warmth.computing)}"
        if warmth.alive and line != self._said:
            click.echo(f"{warmth.waited_s:5.1f} s  {line}", err=True)
            self._said = line


def _caller(organization: str) -> Caller:
    check_printable(organization, 200, "--organization")
    return Caller(_AUTHOR, organization, "admin")


def _read(model: type[M], said: dict[str, Any]) -> M:
    try:
        return model(**said)
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{str(problem['loc'][0]).replace('_', '-')}"
        raise click.BadParameter(problem["msg"], param_hint=option) from None


def _tell(agent: str, done: Activated) -> None:
    before = f", in place of {done.previous_version}" if done.previous_version else ""
    click.echo(f"{agent}: version {done.active.profile.version} is active{before}; {_told(done.warmth)}")


def _told(warmth: Warmth | None) -> str:
    if warmth is None or (warmth.why is not None and not warmth.workers):
        return _WHY[warmth.why if warmth is not None and warmth.why is not None else "off"]
    where = f"computed on {', '.join(warmth.workers)} after {warmth.waited_s:.1f} s"
    return f"{where}; {_WHY[warmth.why]}" if warmth.why is not None else where


def _tell_pin(agent: str, pinned: Pinned) -> None:
    copies = f"pinned, {pinned.copies} {'copy' if pinned.copies == 1 else 'copies'}" if pinned.copies else "not pinned"
    version = f"version {pinned.version}" if pinned.version else "no version is active"
    if pinned.seen is None:
        where = "where it is computed is not known"
    else:
        holders = ", ".join(pinned.seen.holders) or "no worker"
        where = f"computed on {holders}"
        if pinned.seen.computing:
            where += f", being computed on {', '.join(pinned.seen.computing)}"
    click.echo(f"{agent}: {copies}; {version}; {where}")
