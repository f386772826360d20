"""`flask doctor`: shows what is wrong with an installation, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from gateway_app.doctor.examination import examine
from gateway_app.doctor.finding import Finding
from tasks.errors import ConfigurationError
from tasks.settings import settings

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red", "unknown": "cyan"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for a machine.")
@click.option("--quiet", is_flag=True, help="Leave out what is well.")
def doctor(*, as_json: bool, quiet: bool) -> None:
    """Say what is wrong with this installation, and what to do.

    Looks from this host at the configuration, secrets, Redis, the database, clocks, disks, processes, the model and MetaQore.
    Changes nothing, shows no secret, takes at most 20 seconds. The exit status is 1 if something fails.
    """
    try:
        found = examine(settings())
    except ConfigurationError as error:
        found = examine(error)
    counts = {status: sum(finding.status == status for finding in found) for status in COLOURS}
    shown = [finding for finding in found if not (quiet and finding.status == "ok")]
    if as_json:
        click.echo(json.dumps({"counts": counts, "findings": [asdict(finding) for finding in shown]}, indent=2))
    else:
        width = max((len(finding.name) for finding in shown), default=0)
        for finding in shown:
            _show(finding, width)
        click.echo(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    if counts["fail"]:
        raise SystemExit(1)


def _show(finding: Finding, width: int) -> None:
    status = click.style(f"{finding.status:7}", fg=COLOURS[finding.status])
    click.echo(f"{status}  {finding.name:{width}}  {finding.says}")
    if finding.remedy:
        click.echo(f"{'':7}  {'':{width}}  → {finding.remedy}")
