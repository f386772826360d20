"""What others do to MetaQore's files, and how a follower runs as a command while the database or the disk fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gateway_app.audit.cli import audit
from gateway_app.audit.follow import Follower
from tasks.db import Database
from tasks.errors import DatabaseUnavailable
from tests.gateway_app.audit.following import (
    EVERYBODY,
    FOREIGN,
    catch_up,
    dies_before_its_second_note,
    held,
    is_whole,
    path_of,
)
from tests.gateway_app.audit.recording import fill

pytestmark = pytest.mark.usefixtures("small_batches")


def test_lines_of_others_stay(database: Database, folder: Path) -> None:
    """MetaQore's own lines, before and between."""
    path = path_of(folder, "acme")
    path.write_bytes(FOREIGN)
    catch_up(database, folder)
    with path.open("ab") as file:
        file.write(FOREIGN)
    fill(database, 1, "acme")
    catch_up(database, folder)
    lines = path.read_bytes().splitlines(keepends=True)
    assert [number for number, content in enumerate(lines) if content == FOREIGN] == [0, len(lines) - 2]
    is_whole(database, folder)


def test_a_line_another_has_not_ended(database: Database, folder: Path) -> None:
    """It is left as it is, and ours begins on a line of its own; one that is ended within a moment is whole."""
    path = path_of(folder, "acme")
    path.write_bytes(FOREIGN[:-1])
    catch_up(database, folder)
    assert path.read_bytes().startswith(FOREIGN)
    is_whole(database, folder)
    fill(database, 1, "acme")
    with path.open("ab", buffering=0) as file:
        file.write(FOREIGN[:20])
        slow = threading.Timer(0.05, file.write, [FOREIGN[20:]])
        slow.start()
        catch_up(database, folder)
        slow.join()
    assert path.read_bytes().count(FOREIGN) == 2
    is_whole(database, folder)


@pytest.mark.parametrize(
    "rotate", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.rename(f"{path}.1")]
)
def test_a_file_that_is_gone(database: Database, folder: Path, rotate: Callable[[Path], object]) -> None:
    """Deleted, emptied or renamed: the new one begins with the next event, and nothing is written twice."""
    catch_up(database, folder)
    rotate(path_of(folder, "acme"))
    new = fill(database, 2, "acme")
    catch_up(database, folder)
    assert held(path_of(folder, "acme")) == new


@pytest.mark.parametrize("rotate", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_file_that_is_gone_at_a_bad_moment(
    database: Database, folder: Path, rotate: Callable[[Path], object]
) -> None:
    """While the follower lies killed between its two notes: the batch is written again, once, and no event is missing."""
    path = path_of(folder, "acme")
    path.write_bytes(FOREIGN * 100)
    dies_before_its_second_note(database, folder)
    written = held(path)
    assert written
    rotate(path)
    dies_before_its_second_note(database, folder)
    assert held(path) == written
    catch_up(database, folder)
    is_whole(database, folder)


def test_a_file_that_is_replaced_by_a_copy(database: Database, folder: Path) -> None:
    """What it holds is not written again: what counts is in the file, not which file it is."""
    path = path_of(folder, "acme")
    dies_before_its_second_note(database, folder)
    copy = path.read_bytes()
    path.unlink()
    path.write_bytes(copy)
    catch_up(database, folder)
    is_whole(database, folder)


def test_the_database_goes_away(database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that runs for good waits for it; it says so once."""
    said: list[str] = []
    stop = threading.Event()
    answers = iter([*[DatabaseUnavailable()] * 3])
    read = Database.read

    def flaky(self: Database, work: Any) -> Any:
        for error in answers:
            raise error
        return read(self, work)

    monkeypatch.setattr(Database, "read", flaky)
    follower = Follower(database, EVERYBODY, folder, said.append)
    thread = threading.Thread(target=follower.run, args=(stop, 0.01))
    thread.start()
    deadline = time.monotonic() + 20
    while follower.appended < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    thread.join()
    monkeypatch.undo()
    assert said == ["the database cannot be reached; trying again"]
    is_whole(database, folder)


def test_the_disk_is_full(database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The follower ends with the system's error, and goes on once there is room."""
    write = os.write

    def full(descriptor: int, content: bytes) -> int:
        if len(content) < 300:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[:300])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            catch_up(database, folder)
    catch_up(database, folder)
    is_whole(database, folder)


def test_as_a_command(database: Database, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows until SIGTERM, and ends at once and well; `--once` ends by itself, and says what was left out."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'gateway.db'}")
    monkeypatch.setenv("METAQORE_AUDIT__FOLLOW_INTERVAL_S", "3600")
    arguments = ["follow", "--all", "--directory", str(folder)]
    command = [sys.executable, "-m", "flask", "audit", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "following into" in process.stderr.readline()
            deadline = time.monotonic() + 20
            while not (path_of(folder, "acme").exists() and path_of(folder, "other").exists()):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            second = CliRunner().invoke(audit, [*arguments, "--once"])
            assert (second.exit_code, "another follower" in second.stderr) == (1, True)
            process.terminate()
            ended = process.communicate(timeout=20)[1]
        finally:
            process.kill()
    assert (process.returncode, ended) == (0, "9 events appended\n")
    is_whole(database, folder)
    fill(database, 1, "a/b")
    left = CliRunner().invoke(audit, [*arguments, "--once"])
    assert left.exit_code == 1
    assert "left out organization 'a/b'" in left.stderr
    wrong = CliRunner().invoke(audit, [*arguments, "--organization", "acme"])
    assert (wrong.exit_code, "either" in wrong.stderr) == (2, True)
