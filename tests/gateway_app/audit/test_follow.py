"""MetaQore's files hold each event once, wherever a follower died: at every call to the system it is killed once."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway_app.audit import checkpoint, trail_file
from gateway_app.audit.follow import Follower
from tasks.db import Database
from tests.gateway_app.audit.following import FOREIGN, Died, catch_up, held, is_whole, path_of
from tests.gateway_app.audit.recording import fill, names

pytestmark = pytest.mark.usefixtures("small_batches")


class Disk:
    """The operating system, which kills the process at its `last` call that concerns files.

    If that is a write, `written` of its bytes still get through: a share of them.
    """

    def __init__(self, last: int, written: float) -> None:
        self.calls, self._last, self._written = 0, last, written

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def count(self) -> bool:
        """Tell whether this was the last call."""
        self.calls += 1
        return self.calls == self._last

    def open(self, *arguments: Any) -> int:
        """Open, unless killed."""
        if self.count():
            raise Died
        return os.open(*arguments)

    def write(self, descriptor: int, content: bytes) -> int:
        """Write, or only a part of it."""
        if self.count():
            os.write(descriptor, content[: int(self._written * len(content))])
            raise Died
        return os.write(descriptor, content)

    def ftruncate(self, descriptor: int, size: int) -> None:
        """Cut, unless killed."""
        if self.count():
            raise Died
        os.ftruncate(descriptor, size)

    def fsync(self, _descriptor: int) -> None:
        """Do nothing, which is quick, unless killed."""
        if self.count():
            raise Died


@contextmanager
def killed_at(last: int, written: float = 1.0) -> Iterator[Disk]:
    """Have the follower die at that call."""
    disk, rename = Disk(last, written), Path.replace

    def replace(self: Path, target: Path) -> Path:
        if disk.count():
            raise Died
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "os", disk)
        patched.setattr(trail_file, "os", disk)
        patched.setattr(Path, "replace", replace)
        yield disk


def dies(database: Database, folder: Path, last: int, written: float) -> bool:
    """Follow until the call that kills it; tell whether it came."""
    try:
        with killed_at(last, written):
            catch_up(database, folder)
    except Died:
        return True
    return False


def test_all_organizations(database: Database, folder: Path) -> None:
    """Each has its file. Following again adds nothing; what comes later is added."""
    catch_up(database, folder)
    is_whole(database, folder)
    catch_up(database, folder)
    is_whole(database, folder)
    fill(database, 5, "other", "acme")
    catch_up(database, folder)
    is_whole(database, folder)


def test_one_organization(database: Database, folder: Path) -> None:
    """No other has a file."""
    catch_up(database, folder, "other")
    assert held(path_of(folder, "other")) == names(database, "other")
    assert not path_of(folder, "acme").exists()


@pytest.mark.parametrize("written", [0.4, 0.999, 1.0])
def test_killed_at_every_call(database: Database, tmp_path: Path, written: float) -> None:
    """Whichever call was its last, and however much of a line it wrote: the next follower completes the files."""
    last, alive = 0, False
    while not alive:
        last += 1
        folder = tmp_path / f"at{last}"
        folder.mkdir()
        alive = not dies(database, folder, last, written)
        path_of(folder, "acme").exists() or catch_up(database, folder)
        catch_up(database, folder)
        is_whole(database, folder)
    assert last > 40


def test_killed_again_and_again(database: Database, tmp_path: Path) -> None:
    """Also while it repairs what the one before left, and with MetaQore's lines in between."""
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    for number in range(60):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        foreign = 0
        for _ in range(8):
            dies(database, folder, chance.randrange(1, 45), chance.choice([0.0, 0.3, 0.9, 1.0]))
            path = path_of(folder, "acme")
            if chance.random() < 0.5 and (not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")):
                with path.open("ab") as file:
                    file.write(FOREIGN)
                foreign += 1
        catch_up(database, folder)
        is_whole(database, folder)
        assert path_of(folder, "acme").read_bytes().count(FOREIGN) == foreign


def test_a_careless_follower_is_found_out(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the tests above: without the note of what is about to be appended they fail."""
    keep = Follower._keep

    def careless(self: Follower, new: checkpoint.Checkpoint) -> None:
        keep(self, new.model_copy(update={"intent": None}))

    monkeypatch.setattr(Follower, "_keep", careless)
    with pytest.raises((AssertionError, ValueError)):
        test_killed_at_every_call(database, tmp_path, 1.0)
