"""The previous release, as it was published: its wheel lies beside this file, and its code runs in processes of its own.

A wheel is used, and not the project's history, since a checkout need not have any. It is unpacked: Alembic and the queue
read files of it by their paths.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

[WHEEL] = Path(__file__).parent.glob("metaqore_gateway-*.whl")
VERSION = WHEEL.name.split("-")[1]


def unpack(folder: Path) -> Path:
    """Unpack the release into `folder`; return it. A process finds the release there first if it is started in it."""
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(folder)
    return folder


def newest_revision() -> str:
    """Return the revision of the database that the release was made for."""
    with zipfile.ZipFile(WHEEL) as wheel:
        numbers = [re.fullmatch(r"migrations/versions/(\d{4})_\w+\.py", name) for name in wheel.namelist()]
    return max(number[1] for number in numbers if number)
