"""`flask policy`: an organization's policy, seen and set by an operator, and tried on what is recorded."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta

import click

from gateway_app.commands import Moment, check_printable, explained
from gateway_app.governance.simulation import CHANGES, Report, Trial, simulate
from tasks.db import Database
from tasks.governance.decision import Detection
from tasks.governance.policies import Change, Policies, PolicyVersion, default_policy
from tasks.governance.secure_gateway import resolve_policy
from tasks.schema_governance import DETECTION_MODES
from tasks.settings import settings

_ORGANIZATION = click.option("--organization", default="default", show_default=True, help="Whose policy.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_MAX_REASON = 500
_SHOWN_GROUPS = 20


@click.group()
def policy() -> None:
    """Show, set and try policies."""


@policy.command("show")
@_ORGANIZATION
@explained
def policy_show(organization: str) -> None:
    """Show the policy in force."""
    with closing(_database()) as database:
        click.echo(_line(_policies(database).newest(organization)))


@policy.command("set")
@_ORGANIZATION
@click.option("--policy", "name", required=True, help="A policy's name or alias.")
@click.option("--detection", type=click.Choice(DETECTION_MODES), help="Left out, it stays as it is.")
@click.option("--reason", help="Why, for whoever reads the record; up to 500 characters.")
@click.option("--expected", type=int, help="Refuse unless this version is in force.")
@explained
def policy_set(
    organization: str, name: str, detection: Detection | None, reason: str | None, expected: int | None
) -> None:
    """Put a policy into force, for every request from the next second on and for those that wait.

    Known are default_local_first (default, local_first), enterprise_residency (enterprise, residency) and
    compliance_local_only (compliance, local_only). The change is recorded in the audit.
    """
    for text, longest, option in ((organization, 200, "--organization"), (reason or "-", _MAX_REASON, "--reason")):
        check_printable(text, longest, option)
    wanted = Change("cli", resolve_policy(name), detection, reason, None if expected is None else {expected})
    with closing(_database()) as database:
        click.echo(_line(_policies(database).change(organization, wanted)))


@policy.command("history")
@_ORGANIZATION
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True, help="How many, at most.")
@explained
def policy_history(organization: str, limit: int) -> None:
    """List the versions, the newest first."""
    with closing(_database()) as database:
        policies = _policies(database)
        for version in (*policies.page(organization, None, limit), policies.default):
            click.echo(_line(version))


@policy.command("simulate")
@_ORGANIZATION
@click.option("--policy", "name", required=True, help="The policy to try: a name or an alias.")
@click.option("--detection", type=click.Choice(DETECTION_MODES), help="Left out, each request keeps its own mode.")
@click.option("--since", type=Moment(), help="The first instant; left out, a day before the last.")
@click.option("--until", type=Moment(), help="The instant before which they end; left out, now.")
@_JSON
@explained
def policy_simulate(
    organization: str,
    name: str,
    detection: Detection | None,
    since: datetime | None,
    until: datetime | None,
    *,
    as_json: bool,
) -> None:
    """Decide recorded requests again, under another policy, and say what would change. Changes nothing.

    \b
    flask policy simulate --policy enterprise_residency --since 2026-01-01
    flask policy simulate --policy default --detection refuse --json

    Requests are taken by the time they arrived, and decided by the same rules as they come in by, with the providers
    that the settings call up now. No prompt is read: what detection found was recorded then, if it was not off.
    """  # noqa: D301  the backslash is click's
    end = until or datetime.now(UTC)
    start = since or end - timedelta(days=1)
    if start >= end:
        raise click.BadParameter("must lie before --until", param_hint="--since")
    trial = Trial(organization, start, end, resolve_policy(name), settings().governance.providers, detection)
    with closing(_database()) as database:
        report = simulate(database, trial)
    period = {"since": start.isoformat(), "until": end.isoformat()}
    tried = {"organization": organization, "policy": trial.policy, "detection": detection, **period}
    click.echo(json.dumps({**tried, **report.as_dict()}, indent=1) if as_json else _shown(report))


def _database() -> Database:
    return Database(settings().database)


def _policies(database: Database) -> Policies:
    return Policies(database, default_policy(settings().governance))


def _line(version: PolicyVersion) -> str:
    made = f"{version.created_at:%Y-%m-%d %H:%M}Z  {version.created_by}" if version.created_at else "the settings'"
    reason = f"  {version.reason}" if version.reason else ""
    return f"version {version.version}  {version.policy}  detection {version.detection}  {made}{reason}"


def _shown(report: Report) -> str:
    lines = [f"{report.replayed:,} requests decided again"]
    for change in CHANGES:
        examples = "".join(f"\n    {request_id}" for request_id in report.examples.get(change, ()))
        lines.append(f"{report.changes[change]:>10,}  {change.replace('_', ' ')}{examples}")
    for why, count in report.skipped.items():
        lines.append(f"{count:>10,}  not decided again: {why}")
    groups = [group for group in report.as_dict()["groups"] if any(group[change] for change in CHANGES[:-1])]
    if groups:
        lines.append("by agent and task type")
    for group in groups[:_SHOWN_GROUPS]:
        counts = ", ".join(f"{group[change]:,} {change.replace('_', ' ')}" for change in CHANGES if group[change])
        # A caller chose the names: nothing in them may speak to the terminal.
        lines.append(f"    {ascii(group['agent'])[1:-1]}, {ascii(group['task_type'])[1:-1]}: {counts}")
    if len(groups) > _SHOWN_GROUPS:
        lines.append(f"    and {len(groups) - _SHOWN_GROUPS} more; --json shows all")
    return "\n".join(lines)
