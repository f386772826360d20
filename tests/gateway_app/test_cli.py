"""The `flask` commands, through the entry points by which `flask` finds them.

They run in this process, since to start one that imports all of this takes two seconds. That they work as a process of
their own, too, is the last test's matter.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from flask.cli import cli

from tasks.settings import PREFIX, SECRET_NAMES, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """Work in a folder of the test's own, with no database and no secrets yet."""
    monkeypatch.setenv(f"{PREFIX}SECRETS__DIRECTORY", str(tmp_path / "secrets"))
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'gateway.db'}")
    monkeypatch.setenv(f"{PREFIX}ENGINE__MODEL", str(tiny_model))
    monkeypatch.setenv(f"{PREFIX}GOVERNANCE__PROFILES_DIRECTORY", str(ROOT / "profiles"))
    return tmp_path


def flask(*arguments: str) -> Result:
    """Run a command as `flask` does, with settings read anew and no .flaskenv: no command here needs the application."""
    settings.cache_clear()
    # Flask sets the first of these itself and leaves it; the runner puts back what it was given.
    runner = CliRunner(env={"FLASK_RUN_FROM_CLI": "true", "FLASK_SKIP_DOTENV": "1"})
    return runner.invoke(cli, arguments, prog_name="flask")


def made(*arguments: str) -> str:
    """Run a command that must succeed; return what it printed."""
    result = flask(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_from_nothing_to_a_key(folder: Path) -> None:
    """Secrets, tables, a key; the key is listed without what would let anyone use it, and can be revoked."""
    assert "signing_key" in made("secrets", "create")
    assert "already" in made("secrets", "create")
    for name in SECRET_NAMES:
        assert stat.S_IMODE((folder / "secrets" / name).stat().st_mode) == 0o600
    pending = flask("db", "status")
    assert (pending.exit_code, "flask db upgrade" in pending.stderr) == (1, True)
    made("db", "upgrade")
    assert "up to date" in made("db", "status")
    key = made("keys", "create", "--name", "test", "--organization", "acme").strip()
    assert re.fullmatch(r"mq_[\w-]{43}", key)
    listed = made("keys", "list")
    assert "acme  test  member" in listed
    assert key not in listed
    made("keys", "create", "--name", "chief", "--organization", "acme", "--admin")
    assert "acme  chief  admin" in made("keys", "list")
    key_id = listed.split()[0]
    made("keys", "revoke", key_id)
    assert "revoked" in made("keys", "list")
    assert flask("keys", "revoke", key_id).exit_code == 1


def test_a_key_written_to_a_file(folder: Path) -> None:
    """It is in the file alone, for its owner alone, and never over another file."""
    made("secrets", "create")
    made("db", "upgrade")
    path = folder / "key"
    result = flask("keys", "create", "--name", "test", "--output", str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().strip() not in result.stdout + result.stderr
    again = flask("keys", "create", "--name", "test", "--output", str(path))
    assert (again.exit_code, again.output) == (1, f"Error: {path} cannot be made: File exists\n")
    assert made("keys", "list").count("\n") == 1


def test_profiles_check() -> None:
    """Every profile with its tokens."""
    shown = made("profiles", "check")
    assert re.search(r"incident-responder  version 1  \d+ static tokens  extends engineering-base\n", shown)
    assert re.search(r"engineering-base  version 1  \d+ static tokens  abstract\n", shown)


@pytest.mark.parametrize(
    ("arguments", "variable", "value", "told"),
    [
        (("keys", "list"), f"{PREFIX}SECRETS__DIRECTORY", "/nowhere", "flask secrets create"),
        (("db", "upgrade"), "DATABASE_URL", "mysql://x", "must start with sqlite"),
        (("db", "upgrade"), "DATABASE_URL", "postgresql://127.0.0.1:1/x", "cannot be migrated"),
        (("profiles", "check"), f"{PREFIX}ENGINE__MODEL", "/nowhere", "does not exist"),
        (("keys", "create", "--name", ""), "X", "x", "printable"),
    ],
)
def test_errors_are_messages(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], variable: str, value: str, told: str
) -> None:
    """What is wrong and what helps, without a traceback."""
    monkeypatch.setenv(variable, value)
    result = flask(*arguments)
    # Any other exception would be shown as a traceback.
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code != 0
    assert told in result.stderr


@pytest.mark.parametrize("group", ["audit", "db", "keys", "policy", "profiles", "requests", "secrets"])
def test_help(group: str) -> None:
    """Each group explains itself."""
    assert "Commands:" in made(group, "--help")


@pytest.mark.parametrize(
    ("arguments", "status", "output", "errors"),
    [
        (("secrets", "create"), 0, "signing_key", ""),
        (("keys", "list"), 1, "", "flask secrets create"),
    ],
)
def test_as_a_process(arguments: tuple[str, ...], status: int, output: str, errors: str) -> None:
    """From the project's root, as an operator does: what it says is on the right stream, and its status tells how it ended."""
    command = [sys.executable, "-m", "flask", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert output in done.stdout
    assert errors in done.stderr
    assert "Traceback" not in done.stderr


def test_help_before_there_is_anything(tmp_path: Path) -> None:
    """Without secrets there is no application yet, and its commands are what would make them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    ran = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "gateway_app", "--help"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0
    assert "Usage: " in ran.stdout
    assert " secrets " in ran.stdout
    assert "`flask secrets create` makes it" in ran.stderr
