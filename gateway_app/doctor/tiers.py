"""The tiers below the GPUs' KV caches, as far as this host has room for them. Only where some are configured."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from gateway_app.doctor.finding import Finding, ok, warn
from gateway_app.doctor.secrets import OTHERS
from tasks.kv_folders import engine_folders
from tasks.settings import Settings, TiersGroup

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  where vLLM keeps host RAM's tier
GIB = 2**30


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at what one worker would need; the gateway's host needs none of it, unless a worker runs there."""
    tiers = settings.caching.tiers
    if tiers.ram_gib:
        yield _memory(tiers)
    if tiers.disk_gib:
        yield _disk(tiers)


def _memory(tiers: TiersGroup) -> Finding:
    free_gib = shutil.disk_usage(SHARED_MEMORY).free / GIB
    says = f"{free_gib:,.1f} GiB free in {SHARED_MEMORY}, of which a worker takes {tiers.ram_gib:g}"
    if free_gib < tiers.ram_gib:
        return warn(
            "tier in RAM", f"{says}: it will not start here", "--shm-size, an emptyDir of medium Memory, or less"
        )
    return ok("tier in RAM", says)


def _disk(tiers: TiersGroup) -> Finding:
    folder = tiers.disk_directory
    if not folder.exists():
        # A worker makes it.
        nearest = next(parent for parent in folder.absolute().parents if parent.exists())
        free, held, private = shutil.disk_usage(nearest).free, 0, True
    else:
        free = shutil.disk_usage(folder).free
        held = sum(file.stat().st_size for engine in engine_folders(folder) for file in engine.glob("*/*.kv"))
        private = not folder.stat().st_mode & OTHERS
    says = f"{held / GIB:,.1f} GiB held and {free / GIB:,.1f} GiB free in {folder}"
    if (held + free) / GIB < tiers.disk_gib:
        return warn(
            "tier on disk", f"{says}: less than {tiers.disk_gib:g}", "a larger disk, or less in caching.tiers.disk_gib"
        )
    if not private:
        return warn(
            "tier on disk",
            f"others may look into {folder}: blocks are sealed, how many are whose is not",
            f"chmod 700 {folder}",
        )
    return ok("tier on disk", says)
