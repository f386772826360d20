"""What `flask doctor` says of the tiers below the GPUs' KV caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway_app.doctor.tiers import GIB, examine
from tasks.settings import CachingGroup, Settings, TiersGroup
from worker_gpu.engines.disk_tier_files import BlockFiles, take_folder


def found(ram_gib: float, disk_gib: float = 0.0, directory: Path = Path("var/kv")) -> list[tuple[str, str]]:
    """Return name and status of what is found with these tiers."""
    tiers = TiersGroup(ram_gib=ram_gib, disk_gib=disk_gib, disk_directory=directory)
    return [(one.name, one.status) for one in examine(Settings(caching=CachingGroup(tiers=tiers)))]


def test_nothing_is_said_where_there_are_none() -> None:
    """Most installations have no tiers."""
    assert found(0) == []


def test_room_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container's /dev/shm is small."""
    monkeypatch.setattr("gateway_app.doctor.tiers.SHARED_MEMORY", tmp_path)
    assert found(0.0001) == [("tier in RAM", "ok")]
    assert found(10**9) == [("tier in RAM", "warn")]


def test_room_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tier holds already counts as room; nobody else may look into it."""
    monkeypatch.setattr("gateway_app.doctor.tiers.SHARED_MEMORY", tmp_path)
    directory = tmp_path / "not" / "yet"
    assert found(0.0001, 0.0001, directory)[1] == ("tier on disk", "ok")
    assert found(0.0001, 10**9, directory)[1] == ("tier on disk", "warn")
    files = BlockFiles(take_folder(directory, "0" * 16)[0], bytes(32))
    files.make_folder("0" * 32)
    files.write("0" * 32, bytes(36), memoryview(bytes(2 * 2**20)))
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    assert found(0.0001, 2.5 * 2**20 / GIB, directory)[1] == ("tier on disk", "ok")
    assert found(0.0001, 4 * 2**20 / GIB, directory)[1] == ("tier on disk", "warn")
    directory.chmod(0o755)
    assert found(0.0001, 2.5 * 2**20 / GIB, directory)[1] == ("tier on disk", "warn")
