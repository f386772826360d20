"""Making the secrets that gateway and workers share.

A secret file must never be seen half-written: an empty one would be kept for ever and stop every start. So each is
written under another name first, then linked to its own, which fails if a file of that name exists.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from tasks.settings import KEY_BYTES, SECRET_NAMES


def create_secrets(directory: Path) -> list[str]:
    """Make each secret file that does not exist yet, readable by its owner only. Returns the names of those made."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    contents = {name: secrets.token_hex(KEY_BYTES) for name in SECRET_NAMES}
    # This one a person types.
    contents["flower_password"] = secrets.token_urlsafe(18)
    return [name for name, content in contents.items() if write_once(directory / name, content + "\n")]


def write_once(path: Path, content: str) -> bool:
    """Write a file that only its owner may read, unless there is one already. Returns whether it was written."""
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
