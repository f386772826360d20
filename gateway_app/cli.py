"""`flask` commands: secrets, keys, the database. Each explains itself with `--help`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from gateway_app import release
from gateway_app.commands import check_printable, explained
from gateway_app.governance.api_keys import ApiKeys, Role
from gateway_app.local.secrets import create_secrets
from tasks.db import Database
from tasks.migrating import read_schema, upgrade
from tasks.settings import settings


def _api_keys() -> ApiKeys:
    return ApiKeys(Database(settings().database), settings().secrets.keys("key_pepper"))


@click.group()
def secrets() -> None:
    """Make the secrets that gateway and workers share."""


@secrets.command("create")
@explained
def secrets_create() -> None:
    """Make the secret files that do not exist yet; existing ones are kept."""
    directory = settings().secrets.directory
    made = create_secrets(directory)
    click.echo(f"made {', '.join(made)} in {directory}" if made else f"all secrets are already in {directory}")


@click.group()
def keys() -> None:
    """Make, list and revoke API keys."""


@keys.command("create")
@click.option("--organization", default="default", show_default=True, help="Whom the key's requests belong to.")
@click.option("--name", required=True, help="What you will recognise the key by.")
@click.option("--admin", is_flag=True, help="Let the key change the organization's policy.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the key to this file (mode 600), not the terminal."
)
@explained
def keys_create(organization: str, name: str, output: Path | None, *, admin: bool) -> None:
    """Make an API key. It is shown once: only a hash of it is stored."""
    role: Role = "admin" if admin else "member"
    for label, text in (("organization", organization), ("name", name)):
        check_printable(text, 200, f"--{label}")
    if output is None:
        key_id, key = _api_keys().create(organization, name, role)
        click.echo(key)
    else:
        # The file is made first: a key that cannot be handed over must not exist.
        try:
            descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise click.ClickException(f"{output} cannot be made: {error.strerror}") from None
        with os.fdopen(descriptor, "w") as file:
            key_id, key = _api_keys().create(organization, name, role)
            file.write(key + "\n")
    click.echo(f"{key_id}: organization {organization}, name {name}, {role}", err=True)


@keys.command("list")
@explained
def keys_list() -> None:
    """List all keys, without what would let anyone use them."""
    for row in _api_keys().all():
        state = f"revoked {row.revoked_at:%Y-%m-%d %H:%M}" if row.revoked_at else "active"
        made = f"made {row.created_at:%Y-%m-%d %H:%M}"
        click.echo(f"{row.key_id}  {row.organization}  {row.name}  {row.role}  {made}  {state}")


@keys.command("revoke")
@click.argument("key_id")
@explained
def keys_revoke(key_id: str) -> None:
    """Make a key useless from now on."""
    if not _api_keys().revoke(key_id):
        raise click.ClickException(f"no key in use has the id {key_id}; `flask keys list` shows them")
    click.echo(f"revoked {key_id}")


@click.group()
def db() -> None:
    """Create and migrate the database."""


@db.command("upgrade")
@explained
def db_upgrade() -> None:
    """Bring the tables to what this release needs. Processes of the release before may run meanwhile."""
    upgrade(settings().database.url, lambda why: click.echo(f"waiting: {why}", err=True))
    click.echo(_up_to_date())


@db.command("wait")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds after which to give up, with exit status 1.")
@explained
def db_wait(timeout: float) -> None:
    """Wait until secrets and tables are there, made by somebody else."""
    release.wait(settings(), timeout, lambda missing: click.echo(f"waiting: {missing}", err=True))


@db.command("status")
@explained
def db_status() -> None:
    """Say whether migrations are pending; exit with 1 if so."""
    click.echo(_up_to_date())


def _up_to_date() -> str:
    """Say how the tables are. Raises ClickException if they lack something."""
    database = Database(settings().database)
    try:
        schema = database.read(read_schema)
    finally:
        database.close()
    if schema.pending:
        raise click.ClickException(f"pending: {', '.join(schema.pending)}; run `flask db upgrade`")
    if schema.is_newer:
        return f"the database is of a newer release, at revision {schema.revision}; this release runs on it if it is the one before"
    return "the database is up to date"
