"""What starts a process is the same command everywhere: in the Procfile, and for systemd, Compose and Kubernetes."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.deploy.manifests import DEPLOY, ROOT, documents, unit

#: What a unit adds for its instance.
INSTANCE = ["-n", "gpu%i@%%h"]
ADDRESS = "--address="


def procfile() -> dict[str, list[str]]:
    """Return the command of each process, without what only honcho needs."""
    lines = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text("utf-8").splitlines())
    assert lines.pop("release").startswith("flask secrets create && flask db upgrade && ")
    assert all(line.startswith("flask db wait && exec ${HONCHO_PROCESS_NAME:+") for line in lines.values())
    return {name: shlex.split(line.rpartition("together} ")[2]) for name, line in lines.items()}


def systemd() -> dict[str, list[str]]:
    """Return the command of each unit."""
    found = {}
    for path in (DEPLOY / "systemd").glob("*.service"):
        program, *arguments = unit(path)["ExecStart"][0].split()
        name = path.stem.removeprefix("metaqore-").rstrip("@")
        words = [program.removeprefix("/opt/metaqore/bin/"), *arguments]
        found["web" if name == "gateway" else name] = [word for word in words if word not in INSTANCE]
    return found


def image(name: str) -> list[str]:
    """Return an image's own command."""
    text = (DEPLOY / "docker" / f"{name}.Dockerfile").read_text("utf-8")
    command: list[str] = json.loads(text.splitlines()[-1].removeprefix("CMD "))
    return command


def compose() -> dict[str, list[str]]:
    """Return the command of each service."""
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    names = {"gateway": "web", "worker": "worker", "housekeeping": "housekeeping", "flower": "flower"}
    return {ours: services[name].get("command") or image(name) for name, ours in names.items()}


def kubernetes() -> dict[str, list[str]]:
    """Return the command of each workload."""
    found = {}
    for name, ours in {
        "gateway": "web",
        "worker": "worker",
        "housekeeping": "housekeeping",
        "flower": "flower",
    }.items():
        (container,) = documents(DEPLOY / "kubernetes" / f"{name}.yaml")[0]["spec"]["template"]["spec"]["containers"]
        found[ours] = container.get("command") or image(name)
    return found


@pytest.mark.parametrize("name", ["web", "worker", "housekeeping", "flower"])
def test_one_command(name: str) -> None:
    """But for the address that Flower listens on, which in a container is the container's."""
    kinds = {"systemd": systemd(), "Compose": compose(), "Kubernetes": kubernetes()}
    expected = [word for word in procfile()[name] if not word.startswith(ADDRESS)]
    for kind, commands in kinds.items():
        assert [word for word in commands[name] if not word.startswith(ADDRESS)] == expected, kind
    addresses = {
        kind: [word for word in commands[name] if word.startswith(ADDRESS)] for kind, commands in kinds.items()
    }
    if name == "flower":
        loopback, everywhere = [f"{ADDRESS}127.0.0.1"], [f"{ADDRESS}0.0.0.0"]
        assert addresses == {"systemd": loopback, "Compose": everywhere, "Kubernetes": loopback}
