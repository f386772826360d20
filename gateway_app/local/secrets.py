"""Making the secrets that gateway and workers share."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tasks.settings import KEY_BYTES, SECRET_NAMES


def create_secrets(directory: Path) -> list[str]:
    """Make each secret file that does not exist yet, readable by its owner only. Returns the names of those made."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = []
    for name in SECRET_NAMES:
        try:
            descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(KEY_BYTES) + "\n")
        made.append(name)
    return made
