"""What a follower refuses: nothing is written on a guess, and nothing where it does not belong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway_app.audit import checkpoint, trail_file
from tasks.db import Database
from tasks.errors import FollowRefused
from tests.gateway_app.audit.following import (
    EVERYBODY,
    catch_up,
    dies_before_its_second_note,
    is_whole,
    path_of,
)
from tests.gateway_app.audit.recording import fill, opened

pytestmark = pytest.mark.usefixtures("small_batches")


def test_a_second_follower(database: Database, folder: Path) -> None:
    """Is refused, as long as the first one lives."""
    with checkpoint.locked(folder), pytest.raises(FollowRefused, match="another follower"):
        catch_up(database, folder)
    catch_up(database, folder)


def test_another_choice_of_organizations(database: Database, folder: Path) -> None:
    """One checkpoint is one follower's: with another choice, earlier events would be missing."""
    catch_up(database, folder, "acme")
    for other in (EVERYBODY, "other"):
        with pytest.raises(FollowRefused, match="organization acme"):
            catch_up(database, folder, other)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"null",
        b'{"version": 2}',
        b"\xff",
        b'{"version":1,"organization":null,"last":"x"}',
        b'{"version":1,"organization":null,"intent":{"events":1,"files":{"x":-1}}}',
    ],
)
def test_a_checkpoint_that_is_none(database: Database, folder: Path, content: bytes) -> None:
    """Nothing is written on a guess."""
    (folder / checkpoint.NAME).write_bytes(content)
    with pytest.raises(FollowRefused, match=r"no checkpoint"):
        catch_up(database, folder)
    assert not path_of(folder, "acme").exists()


def test_a_checkpoint_that_was_lost(database: Database, folder: Path) -> None:
    """A file that holds events already is not begun again from the start."""
    catch_up(database, folder)
    before = path_of(folder, "acme").read_bytes()
    (folder / checkpoint.NAME).unlink()
    for whose in (EVERYBODY, "acme"):
        with pytest.raises(FollowRefused, match="has no checkpoint"):
            catch_up(database, folder, whose)
    assert path_of(folder, "acme").read_bytes() == before


def test_an_older_copy_of_the_database(database: Database, folder: Path, sqlite_template: Path, tmp_path: Path) -> None:
    """What was followed last is not in it."""
    catch_up(database, folder)
    older = tmp_path / "older.db"
    older.write_bytes(sqlite_template.read_bytes())
    with opened(f"sqlite:///{older}") as other, pytest.raises(FollowRefused, match="another record"):
        catch_up(other, folder)


def test_an_older_copy_after_a_kill(database: Database, folder: Path, sqlite_template: Path, tmp_path: Path) -> None:
    """A batch that was begun cannot be read again from it."""
    dies_before_its_second_note(database, folder)
    older = tmp_path / "older.db"
    older.write_bytes(sqlite_template.read_bytes())
    with opened(f"sqlite:///{older}") as other:
        fill(other, 2)
        with pytest.raises(FollowRefused, match="fewer events"):
            catch_up(other, folder)


@pytest.mark.parametrize("name", [checkpoint.NAME, checkpoint.LOCK_NAME, "compliance_audit_acme.jsonl"])
def test_links_are_not_followed(database: Database, folder: Path, tmp_path: Path, name: str) -> None:
    """Nobody who may write to the folder has the follower write elsewhere."""
    target = tmp_path / "precious"
    target.write_bytes(b"{}")
    (folder / name).symlink_to(target)
    with pytest.raises(FollowRefused):
        catch_up(database, folder)
    assert target.read_bytes() == b"{}"


def test_a_pipe_in_the_files_place(database: Database, folder: Path) -> None:
    """It is refused, and not waited for."""
    os.mkfifo(path_of(folder, "acme"))
    with pytest.raises(FollowRefused, match="no regular file"):
        catch_up(database, folder)


@pytest.mark.parametrize("name", ["a/b", "../x", "", "a\nb", "a\x00b", "\ud800", "x" * 240, "\u00e4" * 200])
def test_organizations_without_a_file(name: str) -> None:
    """They are refused, with a reason."""
    with pytest.raises(FollowRefused):
        trail_file.file_name(name)


def test_an_organization_without_a_file_is_left_out(database: Database, folder: Path) -> None:
    """That is said once, and the others go on."""
    fill(database, 6, "a/b", "acme", "..")
    said = catch_up(database, folder)
    assert [text for text in said if "left out" in text and "'a/b'" in text] == said
    is_whole(database, folder)
    assert path_of(folder, "..").exists()
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".jsonl") == [
        *("compliance_audit_...jsonl", "compliance_audit_acme.jsonl", "compliance_audit_other.jsonl")
    ]
