"""What `deploy/` holds, read as its users' tools read it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.settings import PREFIX, Settings, load

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
#: What is read by others than our settings: gunicorn, Flower, CUDA, Python, the shell, Flask, the caches' libraries.
FOREIGN = {
    *(
        "FORWARDED_ALLOW_IPS",
        "FLOWER_BASIC_AUTH",
        "CUDA_VISIBLE_DEVICES",
        "PYTHONUNBUFFERED",
        "PYTHONDONTWRITEBYTECODE",
    ),
    *("PATH", "HOME", "FLASK_APP", "XDG_CACHE_HOME"),
}
OURS = ("REDIS_URL", "DATABASE_URL", "METAQORE_CONFIG")
#: In the place of what operators fill in.
EXAMPLES = {"REDIS_URL": "redis://:secret@redis:6379/0", "DATABASE_URL": "postgresql://user:secret@postgres/metaqore"}
#: What a process needs to end in order after its own time for that is over.
SPARE_S = 10


def settings_of(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return what a process has for settings that is started with these variables and no others.

    Fails the test for a variable that nobody reads.
    """
    for name in variables:
        assert name in FOREIGN or name in OURS or name.startswith(PREFIX), f"nobody reads {name}"
    with monkeypatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(PREFIX) or name in OURS:
                patch.delenv(name)
        patch.chdir(ROOT)
        for name, value in variables.items():
            # The repository's own gateway.json stands for the installed one.
            if name not in FOREIGN and name != "METAQORE_CONFIG":
                patch.setenv(name, value or EXAMPLES[name])
        return load()


def documents(path: Path) -> list[dict[str, Any]]:
    """Return the YAML documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """Give every Kubernetes object, with its file's name."""
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in documents(path):
            yield path.name, document


def unit(path: Path) -> dict[str, list[str]]:
    """Return a systemd unit's directives, each with its values in order, whatever their section."""
    found: dict[str, list[str]] = {}
    for line in path.read_text("utf-8").splitlines():
        if match := re.fullmatch(r"([A-Za-z]+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def seconds(text: str) -> int:
    """Return a duration of Compose's or systemd's, in whole seconds."""
    match = re.fullmatch(r"(\d+)(s|m)?", text)
    assert match, text
    return int(match[1]) * (60 if match[2] == "m" else 1)
