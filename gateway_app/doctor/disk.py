"""Space on a disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from gateway_app.doctor.finding import Finding, fail, ok, unknown, warn

#: In bytes. A database or Redis without space takes no more requests.
LITTLE, NEXT_TO_NONE = 2 * 2**30, 200 * 2**20


def disk_space(name: str, folder: Path) -> Finding:
    """Return how much space is left in `folder`."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return unknown(name, f"{folder}: {error.strerror}")
    says = f"{free / 2**30:,.1f} GiB free in {folder}"
    remedy = f"make room in {folder}, or move it to a larger disk"
    if free < NEXT_TO_NONE:
        return fail(name, says, remedy)
    return warn(name, says, remedy) if free < LITTLE else ok(name, says)
