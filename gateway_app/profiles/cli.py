"""`flask profiles`: look at the shipped profiles, and take an organization's out and in as YAML.

What changes which version requests get is in `switching_cli`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import click
from pydantic import ValidationError

from gateway_app.commands import explained
from gateway_app.profiles.changes import ProfileChanges
from gateway_app.profiles.drafts import Because, ProfileFile
from gateway_app.profiles.sealing import Why
from gateway_app.profiles.shipped import shipped_inheritance
from gateway_app.profiles.store import ProfileStore
from gateway_app.profiles.switching_cli import activate, canary, pin, pins, promote, roll_back, unpin
from gateway_app.profiles.transfer import Imported, Transfer, export
from tasks.crypto import KeyWrapper
from tasks.db import Database
from tasks.errors import GatewayError
from tasks.prompts.layout import PromptLayout
from tasks.prompts.profile import read_profiles
from tasks.prompts.profile_yaml import MAX_FILE_BYTES
from tasks.prompts.tokenizer import ModelTokenizer, resolve_checkpoint
from tasks.settings import settings

#: Who makes what is imported here, in place of an API key.
_AUTHOR = "cli"
_MAX_NAME = 200
_ORGANIZATION = click.option("--organization", default="default", show_default=True, help="Whose profiles.")


@click.group()
def profiles() -> None:
    """Look at the agent profiles, activate and pin them, export them and import them."""


for _command in (activate, roll_back, canary, promote, pin, unpin, pins):
    profiles.add_command(_command)


@profiles.command("check")
@explained
def profiles_check() -> None:
    """Read and tokenise every shipped profile; say how many tokens each has and whether its ids can be joined."""
    engine = settings().engine
    shipped = read_profiles(settings().governance.profiles_directory)
    inherited = shipped_inheritance(shipped)
    tokenizer = ModelTokenizer(resolve_checkpoint(engine.model_source, engine.revision))
    for agent, profile in shipped.items():
        whole = inherited[agent].before(profile)
        layout = PromptLayout(tokenizer, whole.text or None, [(one.user, one.assistant) for one in whole.examples])
        joined = f"{len(layout.static_token_ids)} static tokens" if layout.joinable else "encoded whole: not joinable"
        extends = f"  extends {profile.extends}" if profile.extends else ""
        click.echo(f"{agent}  version {profile.version}  {joined}{extends}{'  abstract' if profile.abstract else ''}")


@profiles.command("export")
@_ORGANIZATION
@click.option("--agent", help="Print this agent alone, instead of writing all to files.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="Where a file for each agent goes.")
@explained
def profiles_export(organization: str, agent: str | None, output: Path | None) -> None:
    """Write the active version of every agent as YAML, as `flask profiles import` reads it."""
    if (agent is None) == (output is None):
        raise click.UsageError("give either --agent or --output")
    found = [profile for profile in _transfer().active(organization) if agent in (None, profile.agent)]
    if output is None:
        if not found:
            raise click.ClickException(f"no version of {agent!r} is active in organization {organization}")
        click.echo(export(found[0]), nl=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for profile in found:
        path = output / f"{_file_name(profile.agent)}.yaml"
        path.write_text(export(profile), encoding="utf-8", newline="\n")
        click.echo(f"{path}  version {profile.version}")


@profiles.command("import")
@_ORGANIZATION
@click.option("--dry-run", is_flag=True, help="Only show what would be added, with the differences.")
@click.option("--author", help="Whoever wrote them, for the versions' record.")
@click.option("--reason", help="One line for those who read the record.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@explained
def profiles_import(
    organization: str, files: tuple[Path, ...], author: str | None, reason: str | None, *, dry_run: bool
) -> None:
    """Add the profiles in FILES as drafts; a base goes before what extends it. None is added if one cannot be read."""
    try:
        said = Because(author=author, reason=reason)
    except ValidationError as error:
        name = error.errors()[0]["loc"][0]
        raise click.BadParameter("must be one line without control characters", param_hint=f"--{name}") from None
    why, transfer = Why(_AUTHOR, said.author, said.reason), _transfer()
    read = {path: _read(transfer, path) for path in files}
    names = [file.agent for file in read.values()]
    if len(set(names)) < len(names):
        raise click.ClickException("two of the files are of the same agent")
    for file in _bases_first(list(read.values())):
        done = transfer.take(organization, why, file, dry_run=dry_run, coming=names)
        for line in _told(done, dry_run=dry_run):
            click.echo(line)


def _told(done: Imported, *, dry_run: bool) -> Iterator[str]:
    what = {
        "created": "a new agent",
        "added": "another version",
        "unchanged": f"as version {done.newest}: nothing to add",
    }
    number = f", draft {done.version}" if done.version is not None else ""
    yield f"{done.agent}: {what[done.action]}{number}"
    if dry_run and done.comparison is not None:
        yield from (change.diff.rstrip("\n") for change in done.comparison.changes)


def _transfer() -> Transfer:
    database, keys = Database(settings().database), KeyWrapper(settings().secrets.keys("master_key"))
    limits = settings().profiles
    shipped = read_profiles(settings().governance.profiles_directory)
    return Transfer(ProfileStore(database, keys), shipped, ProfileChanges(database, keys, limits), limits)


def _read(transfer: Transfer, path: Path) -> ProfileFile:
    try:
        with path.open("rb") as file:
            return transfer.read(file.read(MAX_FILE_BYTES + 1))
    except OSError as error:
        raise click.ClickException(f"{path}: {error.strerror}") from None
    except GatewayError as error:
        problems = "; ".join(f"{each['field']}: {each['message']}" for each in error.extensions.get("errors", ()))
        raise click.ClickException(f"{path}: {problems or error.detail}") from None


def _bases_first(files: list[ProfileFile]) -> Iterator[ProfileFile]:
    while files:
        waiting = {file.agent for file in files}
        ready = [file for file in files if file.extends not in waiting]
        # Of a circle all are handed out: that it is one is said where they are first used.
        yield from ready or files
        files = [file for file in files if file not in ready] if ready else []


def _file_name(agent: str) -> str:
    name = quote(agent, safe=" ")
    return name if len(name) <= _MAX_NAME else hashlib.sha256(agent.encode()).hexdigest()
