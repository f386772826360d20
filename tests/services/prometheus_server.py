"""A Prometheus for tests, out of Debian's package: unpacked, never installed, and kept beside the models.

Where apt knows no packages yet, or not as this user, it is given lists of its own, so that nothing of the machine changes.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import requests
import yaml

from tasks.settings import CACHE_HOME
from tests.services.helpers import free_port, missing
from tests.services.server import Server

PACKAGE = "prometheus"
DOWNLOAD_S = 240.0


def programs() -> Path:
    """Return the folder with `prometheus` and `promtool`. Where they cannot be had, the test is skipped, or fails."""
    kept = CACHE_HOME / "debian-prometheus"
    if not (kept / "usr" / "bin" / "promtool").exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            missing("Prometheus comes from Debian's package, and this is no Debian")
        CACHE_HOME.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE_HOME) as name:
            folder = Path(name)
            try:
                package = _download(folder)
                _run(["dpkg", "-x", str(package), str(folder / "root")], folder)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired, StopIteration) as error:
                missing(f"Debian's package {PACKAGE} cannot be had: {error}")
            # Another test process may have been faster.
            with suppress(OSError):
                (folder / "root").rename(kept)
    return kept / "usr" / "bin"


def _download(folder: Path) -> Path:
    try:
        _run(["apt-get", "-o", "APT::Sandbox::User=root", "download", PACKAGE], folder)
    except subprocess.CalledProcessError:
        for part in ("lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        options = {"APT::Sandbox::User": "root", "Dir::State::lists": folder / "lists", "Dir::Cache": folder / "cache"}
        apt = ["apt-get", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
        _run([*apt, "update"], folder)
        _run([*apt, "download", PACKAGE], folder)
    return next(folder.glob("*.deb"))


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=DOWNLOAD_S)


class PrometheusServer(Server):
    """Prometheus with this configuration, which scrapes as often as that says."""

    name = "prometheus"

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._programs = programs()
        super().__init__()
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self._port = port
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(dict(configuration)), "utf-8")

    def command(self) -> list[str]:
        """Return the command that runs it in the foreground."""
        options = {
            "config.file": self.folder / "prometheus.yml",
            "storage.tsdb.path": self.folder / "data",
            "web.listen-address": f"127.0.0.1:{self._port}",
        }
        return [str(self._programs / "prometheus"), *(f"--{name}={value}" for name, value in options.items())]

    def answers(self) -> bool:
        """Tell whether it takes queries."""
        with suppress(requests.RequestException):
            return requests.get(f"{self.url}/-/ready", timeout=5).ok
        return False

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data that its API answers with. Fails with what it says is wrong."""
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that an expression has now, each with its labels and value."""
        result: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return result
