"""The systemd units: what systemd itself says of them, and that they are true to the settings and to each other."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from gateway_app.housekeeping.worker import EXIT_CONFIGURATION
from tasks.settings import SECRET_NAMES
from tests.deploy.manifests import DEPLOY, SPARE_S, seconds, settings_of, unit
from tests.services.helpers import missing
from worker_gpu.engine_step import EXIT_ENGINE_DEAD

FOLDER = DEPLOY / "systemd"
UNITS = {path.name: unit(path) for path in sorted(FOLDER.glob("*.service"))}
COMMON = unit(FOLDER / "metaqore-.service.d" / "10-common.conf")
SECRETS = [name for name in UNITS if name != "metaqore-flower.service"]
#: systemd's own measure, from 0 (nothing is exposed) to 10: what it calls OK ends at 4.
EXPOSURE = 2.0


def environment(name: str) -> dict[str, str]:
    """Return a unit's variables, those of the common part first, and those of the example file it reads last."""
    found: dict[str, str] = {}
    for line in (*COMMON["Environment"], *UNITS[name].get("Environment", ())):
        found |= dict(word.split("=", 1) for word in shlex.split(line))
    (file,) = UNITS[name]["EnvironmentFile"]
    example = (FOLDER / f"{Path(file).name}.example").read_text("utf-8")
    return found | dict(re.findall(r"^([A-Z_]+)=(.*)$", example, re.MULTILINE))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a root folder in which the units and the programs that they start are installed."""
    shutil.copytree(FOLDER, tmp_path / "etc" / "systemd" / "system")
    system = tmp_path / "usr" / "lib" / "systemd" / "system"
    system.mkdir(parents=True)
    for name in ("basic", "multi-user", "network-online", "shutdown", "sysinit"):
        (system / f"{name}.target").write_text("[Unit]\nDescription=Stands for systemd's own\n")
    for name in ("flask", "gunicorn", "celery"):
        program = tmp_path / "opt" / "metaqore" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    return tmp_path


def analyze(root: Path, *arguments: str) -> str:
    """Return what systemd-analyze says, on both streams. Where there is none, the test is skipped, or fails."""
    program = shutil.which("systemd-analyze")
    if program is None:
        missing("systemd-analyze is not installed; Debian's package systemd has it")
    said = subprocess.run([program, *arguments, f"--root={root}"], capture_output=True, text=True, check=False)
    return said.stdout + said.stderr


def verify(root: Path, name: str) -> str:
    """Return what systemd has to say against a unit, of which a template needs an instance."""
    return analyze(root, "verify", "--man=no", "--generators=no", name.replace("@.", "@7."))


@pytest.mark.parametrize("name", [*UNITS, "metaqore.target"])
def test_systemd_has_nothing_to_say(root: Path, name: str) -> None:
    """No unknown directive, no value it cannot read, no program that is missing."""
    assert verify(root, name) == ""


def test_systemd_would_say_something(root: Path) -> None:
    """If a directive were misspelt in the part that all share, or a program were missing."""
    common = root / "etc" / "systemd" / "system" / "metaqore-.service.d" / "10-common.conf"
    common.write_text(common.read_text().replace("ProtectClock=yes", "ProtectClocks=yes"))
    (root / "opt" / "metaqore" / "bin" / "flask").unlink()
    said = verify(root, "metaqore-release.service")
    assert "ProtectClocks" in said
    assert "/opt/metaqore/bin/flask" in said


@pytest.mark.parametrize("name", UNITS)
def test_little_is_exposed(root: Path, name: str) -> None:
    """By systemd's own measure."""
    said = analyze(root, "security", "--offline=yes", name.replace("@.", "@7."))
    measured = re.search(r"exposure level for \S+: ([\d.]+)", said)
    assert measured, said
    assert float(measured[1]) <= EXPOSURE


@pytest.mark.parametrize("name", UNITS)
def test_settings_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and values that the settings accept, the instance of a template filled in."""
    variables = {key: value.replace("%i", "8080") for key, value in environment(name).items()}
    settings = settings_of(variables, monkeypatch)
    assert settings.gateway.port == 8080
    assert variables["METAQORE_SECRETS__DIRECTORY"] == "%d"


@pytest.mark.parametrize("name", UNITS)
def test_secrets_are_handed_over(name: str) -> None:
    """All that the process reads, and Flower its password alone."""
    loaded = dict(line.split(":", 1) for line in UNITS[name]["LoadCredential"])
    assert loaded == {key: f"/etc/metaqore/secrets/{key}" for key in loaded}
    assert set(loaded) == (set(SECRET_NAMES) if name in SECRETS else {"flower_password"})
    assert COMMON["KillMode"] == ["mixed"]


def test_commands_are_given_the_same() -> None:
    """`metaqore-flask` runs what an operator types as the services run."""
    script = (FOLDER / "metaqore-flask").read_text("utf-8")
    assert set(re.findall(r'LoadCredential="(\w+):\$secrets/\1"', script)) == set(SECRET_NAMES)
    assert "metaqore-flask" in script.split('unit="')[1], "the name that the common part is found by"


def test_stopping_outlasts_the_processes_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is killed that is still ending in order."""
    stop_s = {name: seconds(UNITS[name]["TimeoutStopSec"][0]) for name in UNITS if "TimeoutStopSec" in UNITS[name]}
    settings = settings_of({}, monkeypatch)
    assert stop_s["metaqore-gateway@.service"] >= import_module("gateway_app.gunicorn").graceful_timeout + SPARE_S
    assert stop_s["metaqore-worker@.service"] >= settings.scheduling.drain_s + 2 * SPARE_S
    assert stop_s["metaqore-housekeeping.service"] >= 2 * SPARE_S


def test_what_ends_is_started_again() -> None:
    """A worker whose engine has died too; but not one that cannot work as it is configured."""
    for name, directives in UNITS.items():
        if name != "metaqore-release.service":
            assert directives["Restart"] == ["on-failure"]
    worker = UNITS["metaqore-worker@.service"]
    assert worker["RestartPreventExitStatus"] == [str(EXIT_CONFIGURATION)]
    assert str(EXIT_ENGINE_DEAD) not in worker["RestartPreventExitStatus"]
