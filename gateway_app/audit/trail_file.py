"""MetaQore's file of one organization, which MetaQore may write to at the same time.

Lines are added at the end only, and what others wrote is never changed. A process that dies while it writes may leave
the beginning of a line. Where that is the beginning of a line of ours it is cut off, as nothing is lost by it; where it is
another's, that one gets a moment to finish, and then the line is ended for it, so that ours begins on a line of its own.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from gateway_app.audit import checkpoint
from gateway_app.audit.trail import EventName, name_in
from tasks.errors import FollowRefused

#: A file's name has room for this many bytes on the file systems there are.
_MAX_NAME_BYTES = 255
#: A longer line is none of ours, and is looked at in pieces.
_MAX_LINE_BYTES = 16 * 2**20
#: How long another writer has for the rest of its line.
_PATIENCE_S = 0.2
_MODE = 0o640


def file_name(organization: str) -> str:
    """Return the name MetaQore's file has. Raises FollowRefused if the organization's name cannot be part of one."""
    name = f"compliance_audit_{organization}.jsonl"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise FollowRefused("the organization's name is not valid Unicode, so no file can be named by it") from None
    if "/" in organization or not organization.isprintable() or not organization:
        raise FollowRefused("an organization whose name is empty or holds / or control characters has no file")
    if size > _MAX_NAME_BYTES:
        raise FollowRefused(f"the organization's name is too long for a file's, which holds {_MAX_NAME_BYTES} bytes")
    return name


class TrailFile:
    """The file, open. It is made if it is not there. Raises FollowRefused if it is a link or no regular file."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        # Reading and writing: opened for writing alone, a pipe would wait for its reader.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        existed = self._path.exists()
        try:
            self._file = os.open(self._path, flags, _MODE)
        except OSError as error:
            raise FollowRefused(f"{self._path} cannot be written to: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            os.close(self._file)
            raise FollowRefused(f"{self._path} is no regular file")
        if not existed:
            checkpoint.sync_folder(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def size(self) -> int:
        """Return how many bytes the file has."""
        return os.fstat(self._file).st_size

    def written_since(self, size: int, batch: Mapping[EventName, bytes]) -> set[EventName]:
        """Return which events of a batch, with their lines, follow the first `size` bytes; cut off a torn one."""
        found: set[EventName] = set()
        with open(self._file, "rb", closefd=False) as reader:
            reader.seek(size)
            while content := reader.readline(_MAX_LINE_BYTES):
                name = name_in(content)
                if name is not None and name in batch:
                    found.add(name)
                elif not content.endswith(b"\n") and _begins_one_of(content, batch):
                    end = reader.tell()
                    if self.size() == end:
                        os.ftruncate(self._file, end - len(content))
                    break
        return found

    def holds_any(self) -> bool:
        """Tell whether the file holds an event that the gateway wrote."""
        with open(self._file, "rb", closefd=False) as reader:
            return any(name_in(content) for content in iter(lambda: reader.readline(_MAX_LINE_BYTES), b""))

    def append(self, content: bytes) -> None:
        """Add whole lines and force them to the disk. Raises OSError; some of them may be there then."""
        if not self._ends_a_line():
            content = b"\n" + content
        view = memoryview(content)
        while view:
            view = view[os.write(self._file, view) :]
        os.fsync(self._file)

    def _ends_a_line(self) -> bool:
        """Tell whether the next byte begins a line, after a moment for another writer to make it so."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            size = self.size()
            if size == 0 or os.pread(self._file, 1, size - 1) == b"\n":
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_PATIENCE_S / 10)


def _begins_one_of(content: bytes, batch: Mapping[EventName, bytes]) -> bool:
    return any(written.startswith(content) for written in batch.values())
