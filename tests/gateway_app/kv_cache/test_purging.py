"""`flask cache purge` on the host it is run on. What it has workers do is in tests/worker_gpu/test_discards.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway_app.kv_cache.cli import cache
from tasks.kv_folders import organization_folders
from tasks.settings import PREFIX, settings


def test_an_organization_is_purged(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under every salt that is listed; others stay. Without workers that is all there is to do."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv(f"{PREFIX}CACHING__TIERS__DISK_DIRECTORY", str(tmp_path))
    monkeypatch.setenv(f"{PREFIX}SECRETS__ORGANIZATION_SALT", f"{'11' * 32}\n{'22' * 32}")
    settings.cache_clear()
    salts = settings().secrets.keys("organization_salt")
    names = [name for whose in ("acme", "other") for name in organization_folders(salts, whose)]
    blocks = [tmp_path / f"{'0' * 16}-0" / name / f"{'ab' * 36}.kv" for name in names]
    for block in blocks:
        block.parent.mkdir(parents=True)
        block.write_bytes(bytes(2**20))
    purged = CliRunner().invoke(cache, ["purge", "--organization", "acme"])
    assert (purged.exit_code, purged.output) == (0, "this host: 2 blocks, 2.0 MiB\n")
    assert [block.exists() for block in blocks] == [False, False, True, True]
    assert CliRunner().invoke(cache, ["purge", "--organization", "\n"]).exit_code == 2
