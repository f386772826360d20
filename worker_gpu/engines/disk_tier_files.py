"""KV blocks as files: each sealed, each verified before it is used, in a folder that one engine has to itself.

A file is a nonce (12 bytes), then the block and a tag (16 bytes), by AES-256-GCM with a key for each organization. The seal
also covers what the block belongs to: the engine, the organization and the block's hash. So a file that was torn by a
crash, altered, moved, or written by another model is never read as a block, and a stolen disk tells no prompt.

A file is written under another name and then renamed. There is no fsync: what a power failure tears fails to unseal.

An engine locks its folder as long as it lives; a second one of the same kind takes the next number. That makes each
engine's index exact without asking the disk, since nobody else adds or evicts there. A folder is named by what the bytes
depend on (model, layout, master key), so an engine that changed begins with an empty one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tasks.crypto import NONCE_BYTES, derive
from tasks.kv_folders import BLOCK_NAME, ORGANIZATION_NAME, engine_folders

#: What a file has beside its block: nonce and tag.
SEAL_BYTES = NONCE_BYTES + 16
_LOCK = "lock"


class BlockUnreadable(Exception):
    """A block's file is torn, altered, or not of this block."""


def take_folder(directory: Path, identity: str) -> tuple[Path, int]:
    """Lock a folder for the engine that `identity` (16 hexadecimal digits) names; return it, and the lock's descriptor.

    The lock ends with the process. Raises OSError if the directory cannot be used.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in count():
        folder = directory / f"{identity}-{number}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if (lock := _lock(folder)) is not None:
            # For `make_room`: when it was taken last.
            (folder / _LOCK).touch()
            return folder, lock
    raise AssertionError


def make_room(directory: Path, needed_bytes: int) -> bool:
    """Remove folders that no engine holds, the longest unused first, until so much of the disk is free; tell whether it is.

    They are what engines with other models, or more workers, left behind.
    """
    for folder in sorted(engine_folders(directory), key=_last_used):
        if shutil.disk_usage(directory).free >= needed_bytes:
            return True
        if (lock := _lock(folder)) is not None:
            shutil.rmtree(folder)
            os.close(lock)
    return shutil.disk_usage(directory).free >= needed_bytes


def _lock(folder: Path) -> int | None:
    """Return the descriptor that holds a folder's lock, or None if another process has it."""
    descriptor = None
    with suppress(BlockingIOError, FileNotFoundError):
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever had it until now may have removed the folder.
        if os.path.samestat(os.fstat(descriptor), (folder / _LOCK).stat()):
            return descriptor
    if descriptor is not None:
        os.close(descriptor)
    return None


def _last_used(folder: Path) -> float:
    with suppress(FileNotFoundError):
        return (folder / _LOCK).stat().st_mtime
    return 0.0


class BlockFiles:
    """The files in one engine's folder. Any thread may use it."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        """Take a folder that is locked, and the secret that the organizations' keys are derived from."""
        self._folder, self._secret = folder, secret
        self._sealers: dict[str, AESGCM] = {}

    def found(self) -> list[tuple[str, bytes]]:
        """Return the organization and key of every block that is there, the longest unused first; remove unfinished files."""
        found = sorted(self._look())
        return [(organization, key) for _, organization, key in found]

    def _look(self) -> Iterator[tuple[float, str, bytes]]:
        for folder in os.scandir(self._folder):
            if not ORGANIZATION_NAME.fullmatch(folder.name):
                continue
            for file in os.scandir(folder.path):
                if match := BLOCK_NAME.fullmatch(file.name):
                    yield file.stat().st_mtime, folder.name, bytes.fromhex(match[1])
                else:
                    Path(file.path).unlink()

    def make_folder(self, organization: str) -> None:
        """Make the organization's folder unless it is there. Raises ValueError if that is no folder's name."""
        if not ORGANIZATION_NAME.fullmatch(organization):
            raise ValueError("an organization's folder is named by 32 hexadecimal digits")
        (self._folder / organization).mkdir(mode=0o700, exist_ok=True)

    def has_folder(self, organization: str) -> bool:
        """Tell whether the organization's folder is there: it is not once the organization was erased."""
        return (self._folder / organization).is_dir()

    def write(self, organization: str, key: bytes, block: memoryview) -> None:
        """Write a block. Raises OSError if that fails, FileNotFoundError if the organization's folder is gone."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._sealer(organization).encrypt(nonce, block, self._bound(organization, key))
        path = self._path(organization, key)
        unfinished = path.with_name(f".{secrets.token_hex(8)}")
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            try:
                if os.writev(descriptor, (nonce, sealed)) < NONCE_BYTES + len(sealed):
                    raise OSError("the disk took a part of a block")
            finally:
                os.close(descriptor)
            unfinished.rename(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise

    def read(self, organization: str, key: bytes, into: memoryview) -> None:
        """Read a block into memory of its size, which may hold anything after a failure.

        Raises FileNotFoundError if it is not there, BlockUnreadable if the file is not this block, OSError if it cannot be read.
        """
        path = self._path(organization, key)
        content = memoryview(path.read_bytes())
        try:
            block = self._sealer(organization).decrypt(
                content[:NONCE_BYTES], content[NONCE_BYTES:], self._bound(organization, key)
            )
            into[:] = block
        except (InvalidTag, ValueError):
            raise BlockUnreadable from None
        # So that the order of use outlives the process.
        with suppress(OSError):
            os.utime(path)

    def remove(self, organization: str, key: bytes) -> None:
        """Remove a block, if it is there."""
        self._path(organization, key).unlink(missing_ok=True)

    def _path(self, organization: str, key: bytes) -> Path:
        return self._folder / organization / f"{key.hex()}.kv"

    def _bound(self, organization: str, key: bytes) -> bytes:
        """Return what a file is sealed together with."""
        return b"\0".join((self._folder.name.encode(), organization.encode(), key))

    def _sealer(self, organization: str) -> AESGCM:
        sealer = self._sealers.get(organization)
        if sealer is None:
            sealer = self._sealers[organization] = AESGCM(derive(self._secret, "kv-organization", organization))
        return sealer
