"""Following as a process would, and looking at what it left."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest

from gateway_app.audit import checkpoint
from gateway_app.audit.follow import Follower
from gateway_app.audit.trail import EventName, name_in
from tasks.db import Database
from tests.gateway_app.audit.recording import names

FOREIGN = b'{"timestamp": "2026-01-05T10:00:00+00:00", "event_type": "alert", "organization": "acme", "payload": {}}\n'
EVERYBODY = None
NEVER = threading.Event()


def catch_up(database: Database, folder: Path, organization: str | None = EVERYBODY) -> list[str]:
    """Follow what there is, as a process of its own would; return what it said."""
    said: list[str] = []
    with checkpoint.locked(folder):
        Follower(database, organization, folder, said.append).catch_up(NEVER)
    return said


def path_of(folder: Path, organization: str) -> Path:
    """Return an organization's file."""
    return folder / f"compliance_audit_{organization}.jsonl"


def held(*paths: Path) -> list[EventName]:
    """Return the events in files, each of whose lines must be JSON."""
    lines = [content for path in paths for content in path.read_bytes().splitlines(keepends=True)]
    assert all(content.endswith(b"\n") and isinstance(json.loads(content), dict) for content in lines)
    return [name for name in map(name_in, lines) if name is not None]


def is_whole(database: Database, folder: Path) -> None:
    """Fail unless the files hold each event once, each organization's own, in the order of the commits."""
    for organization in ("acme", "other"):
        wanted = names(database, organization)
        assert held(path_of(folder, organization)) == sorted(wanted, key=str), Counter(wanted)


class Died(BaseException):
    """The process was killed."""


def dies_before_its_second_note(database: Database, folder: Path) -> None:
    """Follow a batch, and die when it is appended and nothing says so."""
    keep = Follower._keep

    def fail(self: Follower, new: checkpoint.Checkpoint) -> None:
        if new.last is not None:
            raise Died
        keep(self, new)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Follower, "_keep", fail)
        with pytest.raises(Died):
            catch_up(database, folder)
