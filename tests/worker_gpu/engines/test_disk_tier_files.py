"""KV blocks as files: what is read is what was written, or nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.kv_folders import erase, organization_folder, organization_folders
from worker_gpu.engines.disk_tier_files import SEAL_BYTES, BlockFiles, BlockUnreadable, make_room, take_folder
from worker_gpu.engines.disk_tier_io import Transfers

SECRET, IDENTITY = bytes(32), "0123456789abcdef"
A, B = organization_folder("a"), organization_folder("b")
KEY = b"\x01" * 36
BLOCK = memoryview(os.urandom(5000))


def opened(directory: Path, secret: bytes = SECRET) -> BlockFiles:
    """Return the files of an engine's folder in which both organizations have theirs."""
    files = BlockFiles(take_folder(directory, IDENTITY)[0], secret)
    files.make_folder(A)
    files.make_folder(B)
    return files


def only(directory: Path) -> Path:
    """Return the one block that there is."""
    (file,) = directory.glob("*/*/*.kv")
    return file


def unreadable(files: BlockFiles, organization: str = A, key: bytes = KEY) -> bool:
    """Tell whether a block is taken for none."""
    try:
        files.read(organization, key, memoryview(bytearray(len(BLOCK))))
    except BlockUnreadable:
        return True
    return False


def test_a_block_comes_back(tmp_path: Path) -> None:
    """From a file that only its owner may read, in which nothing of it is to be seen."""
    files = opened(tmp_path / "kv")
    files.write(A, KEY, BLOCK)
    back = bytearray(len(BLOCK))
    files.read(A, KEY, memoryview(back))
    assert back == BLOCK
    file = only(tmp_path / "kv")
    assert file.stat().st_size == len(BLOCK) + SEAL_BYTES
    assert bytes(BLOCK[:64]) not in file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "kv", *list(file.parents)[:2])} == {0o700}


@pytest.mark.parametrize("change", ["torn", "empty", "longer", "altered"])
def test_a_damaged_file_is_no_block(tmp_path: Path, change: str) -> None:
    """Whatever became of it."""
    files = opened(tmp_path)
    files.write(A, KEY, BLOCK)
    file = only(tmp_path)
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    damaged = {"torn": bytes(content[:-1]), "empty": b"", "longer": file.read_bytes() + b"x", "altered": bytes(content)}
    file.write_bytes(damaged[change])
    assert unreadable(files)


def test_a_file_is_the_block_of_its_place_only(tmp_path: Path) -> None:
    """Not another organization's, not another prefix's, not another engine's, and not another installation's."""
    files = opened(tmp_path)
    files.write(A, KEY, BLOCK)
    file = only(tmp_path)
    assert not unreadable(files)
    shutil.copy(file, file.parents[1] / B / file.name)
    assert unreadable(files, organization=B)
    other_key = KEY[:-1] + b"\x02"
    shutil.copy(file, file.with_name(f"{other_key.hex()}.kv"))
    assert unreadable(files, key=other_key)
    assert unreadable(BlockFiles(file.parents[1], b"1" * 32))
    shutil.copytree(file.parents[1], other_engine := tmp_path / "0123456789abcdee-0")
    assert unreadable(BlockFiles(other_engine, SECRET))


def test_what_is_found_is_in_the_order_of_use(tmp_path: Path) -> None:
    """Unfinished files are removed, and what is not ours is left alone."""
    files = opened(tmp_path)
    keys = [KEY[:-1] + bytes([number]) for number in range(3)]
    for number, key in enumerate(keys):
        files.write(A, key, BLOCK)
        os.utime(next(tmp_path.glob(f"*/{A}/{key.hex()}.kv")), (number, number))
    files.read(A, keys[0], memoryview(bytearray(len(BLOCK))))
    unfinished = next(tmp_path.glob(f"*/{A}")) / ".0123"
    unfinished.touch()
    assert files.found() == [(A, keys[1]), (A, keys[2]), (A, keys[0])]
    assert not unfinished.exists()


def test_an_engine_has_its_folder_to_itself(tmp_path: Path) -> None:
    """A second engine takes another; when the first has died, however it did, its folder is free."""
    program = (
        "import sys, pathlib; from worker_gpu.engines.disk_tier_files import take_folder;"
        f"print(take_folder(pathlib.Path({str(tmp_path)!r}), {IDENTITY!r})[0].name, flush=True); sys.stdin.read()"
    )
    command = (sys.executable, "-c", program)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == f"{IDENTITY}-0"
        folder, lock = take_folder(tmp_path, IDENTITY)
        assert folder.name == f"{IDENTITY}-1"
        os.close(lock)
        other.kill()
    assert take_folder(tmp_path, IDENTITY)[0].name == f"{IDENTITY}-0"


def test_room_is_made_of_what_nobody_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused folder of another engine goes first, and one in use never; neither does what is not a tier's."""
    (tmp_path / "letters").mkdir()
    mine, _lock = take_folder(tmp_path, IDENTITY)
    others = [tmp_path / f"{number:016x}-0" for number in (1, 2)]
    for age, other in enumerate(others):
        other.mkdir()
        (other / "lock").touch()
        os.utime(other / "lock", (age, age))

    def usage(_path: Path) -> object:
        return type("Usage", (), {"free": 100 * (3 - sum(other.exists() for other in others))})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert make_room(tmp_path, 200)
    assert [other.exists() for other in others] == [False, True]
    assert not make_room(tmp_path, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "letters"]


def test_an_organization_is_erased_and_the_others_stay(tmp_path: Path) -> None:
    """Under every salt it ever had, in every engine's folder, and while an engine runs."""
    salts = (b"new" + bytes(29), b"old" + bytes(29))
    mine, others = organization_folders(salts, "acme"), organization_folders(salts, "other")
    files = opened(tmp_path)
    for name in (*mine, *others):
        files.make_folder(name)
        files.write(name, KEY, BLOCK)
    erased = erase(tmp_path, mine)
    assert (erased.files, erased.bytes) == (2, 2 * (len(BLOCK) + SEAL_BYTES))
    assert [files.has_folder(name) for name in (*mine, *others)] == [False, False, True, True]
    assert not list(tmp_path.glob("*/.gone-*"))
    assert erase(tmp_path, mine).files == 0
    assert erase(tmp_path / "nowhere", mine).files == 0


def test_what_was_computed_before_is_not_written_after_an_erasure(tmp_path: Path) -> None:
    """The folder is made for a new request only."""
    files = opened(tmp_path)
    transfers = Transfers(files, memoryview(bytearray(2 * len(BLOCK))), len(BLOCK))
    erase(tmp_path, [A])
    transfers.write(1, A, [(KEY, 0)], [])
    transfers.wait()
    (ended,) = transfers.finished()
    assert (ended.moved, ended.failed, ended.erased) == ((), (KEY,), True)
    assert not list(tmp_path.glob("*/*/*.kv"))
    transfers.close()


def test_a_job_tells_what_it_moved(tmp_path: Path) -> None:
    """Many blocks there and back, in several threads; of two that are damaged or missing, the job says so."""
    files, size = opened(tmp_path), 64
    memory = bytearray(os.urandom(20 * size))
    before = bytes(memory)
    transfers = Transfers(files, memoryview(memory), size)
    places = [(bytes([number]) * 36, number) for number in range(20)]
    transfers.write(1, A, places, [])
    transfers.wait()
    assert transfers.finished()[0].moved == tuple(key for key, _ in places)
    memory[:] = bytes(len(memory))
    next(tmp_path.glob(f"*/{A}/{places[3][0].hex()}.kv")).write_bytes(b"torn")
    files.remove(A, places[5][0])
    transfers.read(2, A, places)
    transfers.read(3, A, [])
    transfers.wait()
    ended = {one.job_id: one for one in transfers.finished()}
    assert set(ended[2].failed) == {places[3][0], places[5][0]}
    assert len(ended[2].moved) == 18
    assert not ended[2].erased
    assert (ended[3].moved, ended[3].failed) == ((), ())
    wrong = [
        place for _, place in places if memory[place * size : place * size + size] != before[place * size :][:size]
    ]
    assert wrong == [3, 5]
    transfers.close()


def test_a_disk_that_refuses_costs_nothing_but_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the block is not held, no file is left, and the next one is tried again."""
    files = opened(tmp_path)
    transfers = Transfers(files, memoryview(bytearray(BLOCK)), len(BLOCK))

    def full(*_arguments: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        transfers.write(1, A, [(KEY, 0)], [])
        transfers.wait()
    transfers.write(2, A, [(KEY, 0)], [])
    transfers.wait()
    ended = {one.job_id: one for one in transfers.finished()}
    assert (ended[1].failed, ended[2].moved) == ((KEY,), (KEY,))
    assert [path.name for path in tmp_path.glob(f"*/{A}/*")] == [f"{KEY.hex()}.kv"]
    transfers.close()
