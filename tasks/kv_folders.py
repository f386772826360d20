"""Where the disk tier keeps an organization's KV blocks, and how they are erased.

A KV block tells a prompt to whoever can read it, so on disk each organization has a folder of its own:

    <disk_directory>/<engine>-<number>/<organization>/<block>.kv

The organization's folder bears a name that only the holder of the secret organization_salt can compute. Workers compute it
from a request's cache salt, which is all that an engine learns of an organization; whoever erases, from its name.

Erasing renames a folder before it empties it. A worker that runs misses it with its next access, forgets what was in it,
and writes nothing more of what it had computed before.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tasks.crypto import derive

#: What an engine's folder, an organization's folder and a block's file are named. Nothing else is ever touched.
ENGINE_NAME = re.compile(r"[0-9a-f]{16}-[0-9]{1,4}")
ORGANIZATION_NAME = re.compile(r"[0-9a-f]{32}")
BLOCK_NAME = re.compile(r"((?:[0-9a-f]{2}){5,64})\.kv")
#: How a folder's name begins that is being erased.
_GONE = ".gone-"


@dataclass(frozen=True, slots=True)
class Erased:
    """What was erased: so many files, of so many bytes together."""

    files: int
    bytes: int


def organization_folder(cache_salt: str) -> str:
    """Return the name of the folder for all that was computed under a cache salt; it does not tell the salt."""
    return derive(cache_salt.encode(), "kv-folder", "").hex()[:32]


def organization_folders(salt_keys: Collection[bytes], organization: str) -> list[str]:
    """Return the names of an organization's folders: one for each key that organization_salt has, or had and still lists."""
    return [organization_folder(derive(key, "cache-salt", organization).hex()) for key in salt_keys]


def erase(directory: Path, organization_folders: Collection[str]) -> Erased:
    """Erase these organizations' blocks, of every engine that ever wrote into `directory`. Workers may run meanwhile.

    Raises OSError if something is there and cannot be removed.
    """
    files = size = 0
    for engine in engine_folders(directory):
        for name in organization_folders:
            with suppress(FileNotFoundError):
                (engine / name).rename(engine / f"{_GONE}{secrets.token_hex(8)}")
        # Also those that an earlier attempt did not get to the end of, or that another one removes just now.
        while (gone := next(engine.glob(f"{_GONE}*"), None)) is not None:
            with suppress(FileNotFoundError):
                for file in gone.iterdir():
                    removed = file.stat().st_size
                    file.unlink()
                    files, size = files + 1, size + removed
                gone.rmdir()
    return Erased(files, size)


def engine_folders(directory: Path) -> list[Path]:
    """Return the folders of all engines in `directory`; none if it does not exist."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if ENGINE_NAME.fullmatch(path.name) and path.is_dir())
