"""`flask audit`: the record as a file, once (`export`) or for good (`follow`)."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import click

from gateway_app.audit import checkpoint
from gateway_app.audit.events import Selection
from gateway_app.audit.export import Format, export
from gateway_app.audit.follow import Follower
from gateway_app.commands import Moment, explained
from tasks.db import Database
from tasks.migrating import pending_migrations
from tasks.settings import settings


@click.group()
def audit() -> None:
    """Export the audit trail, or keep MetaQore's file of it."""


@audit.command("export")
@click.option("--organization", default="default", show_default=True, help="Whose events.")
@click.option("--since", type=Moment(), help="The first instant; left out, from the beginning.")
@click.option("--until", type=Moment(), help="The instant before which they end; left out, now.")
@click.option("--format", "form", type=click.Choice(["jsonl", "csv"]), default="jsonl", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to this file, not the terminal.")
@explained
def audit_export(
    organization: str, since: datetime | None, until: datetime | None, form: Format, output: Path | None
) -> None:
    """Write an organization's events, the oldest first, as MetaQore's trail (jsonl) or as a table (csv).

    \b
    flask audit export --organization acme --since 2026-01-01 --until 2026-02-01 \\
        --output compliance_audit_acme.jsonl

    A file appears whole or not at all. If the command fails, what it printed ends with a whole line.
    """  # noqa: D301  the backslash is click's
    selection = Selection(organization, since, until or datetime.now(UTC))
    count, progress = 0, sys.stderr.isatty()
    with _system_errors_told(), _database() as database, _target(output) as target:
        for chunk, number in export(database, selection, form):
            target.write(chunk)
            count += number
            if progress:
                click.echo(f"\r{count:,} events", err=True, nl=False)
        target.flush()
    # On a terminal this replaces the progress.
    click.echo("\r" * progress + f"{count:,} events of organization {ascii(organization)[1:-1]}", err=True)
    if not count:
        click.echo("There are none in this period; MetaQore's SOC2 check calls an empty trail non-compliant.", err=True)


@audit.command("follow")
@click.option("--organization", help="Whose events.")
@click.option("--all", "everybody", is_flag=True, help="Those of all organizations, each in its own file.")
@click.option(
    "--directory",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where MetaQore's compliance_audit_ORGANIZATION.jsonl are.",
)
@click.option("--once", is_flag=True, help="End when all events there are have been appended.")
@explained
def audit_follow(organization: str | None, everybody: bool, directory: Path, once: bool) -> None:
    """Append each event, once, to the file that MetaQore reads, as events come.

    \b
    flask audit follow --organization acme --directory /var/lib/metaqore/audit

    It may be killed and started again at any time. SIGTERM and Ctrl-C end it after the batch at hand.
    """  # noqa: D301  the backslash is click's
    if everybody == (organization is not None):
        raise click.UsageError("give either --organization or --all")

    def say(text: str) -> None:
        click.echo(text, err=True)

    with _system_errors_told(), checkpoint.locked(directory), _database() as database, _stopped() as stop:
        follower = Follower(database, organization, directory, say)
        try:
            if once:
                follower.catch_up(stop)
            else:
                say(f"following into {directory}")
                follower.run(stop, settings().audit.follow_interval_s)
        finally:
            say(f"{follower.appended:,} events appended")
    if follower.left_out:
        raise click.ClickException(f"{len(follower.left_out)} organizations were left out; see above")


@contextmanager
def _system_errors_told() -> Iterator[None]:
    """Show what the operating system refuses as a message, not a traceback."""
    try:
        yield
    except BrokenPipeError:
        # Whoever reads has read enough; click ends the process quietly.
        raise
    except OSError as error:
        raise click.ClickException(f"{error.filename or 'writing'}: {error.strerror}") from None


@contextmanager
def _database() -> Iterator[Database]:
    database = Database(settings().database)
    try:
        if pending := database.read(pending_migrations):
            raise click.ClickException(f"pending: {', '.join(pending)}; run `flask db upgrade`")
        yield database
    finally:
        database.close()


@contextmanager
def _stopped() -> Iterator[threading.Event]:
    """Yield what SIGTERM and Ctrl-C set, in place of ending the process at once."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _target(output: Path | None) -> Iterator[IO[bytes]]:
    """Yield what to write to: standard output, or a file that takes its name once it is whole and on the disk."""
    if output is None:
        yield sys.stdout.buffer
        return
    descriptor, temporary = tempfile.mkstemp(prefix=f".{output.name[:100]}.", dir=output.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
