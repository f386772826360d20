"""How far a follower has come, kept in the folder it writes to, so that it can be killed at any instant.

A checkpoint says which event was followed last. Before a follower appends a batch, it also notes what it is about to do:
how many events, and for each file how long it was. Whoever starts again then knows from where on to look in these files
for what was written of that batch. A checkpoint is replaced as a whole and forced to the disk, so
there is always one, the old or the new. A lock on a file beside it keeps a second follower out; the kernel gives
it back when its holder dies.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from gateway_app.audit.trail import EventName
from tasks.errors import FollowRefused

NAME = ".gateway-follow.json"
LOCK_NAME = ".gateway-follow.lock"
_MAX_BYTES = 4 * 2**20


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Intent(_Kept):
    """A batch that is being appended: how many events were read, and how many bytes each file had, by its name."""

    events: NonNegativeInt
    files: dict[str, NonNegativeInt]


class Checkpoint(_Kept):
    """`organization` is whose events are followed, None for all; `last` the name of the last event that is done."""

    version: Literal[1] = 1
    organization: str | None
    last: str | None = None
    intent: Intent | None = None

    @property
    def last_name(self) -> EventName | None:
        """Return the last event's name."""
        return None if self.last is None else EventName.parse(self.last)

    def intending(self, events: int, sizes: Mapping[str, int]) -> Checkpoint:
        """Return the checkpoint to write before a batch is appended."""
        return self.model_copy(update={"intent": Intent(events=events, files=dict(sizes))})

    def done(self, last: EventName) -> Checkpoint:
        """Return the checkpoint to write once everything up to `last` is in the files and on the disk."""
        return self.model_copy(update={"last": str(last), "intent": None})


def read(folder: Path) -> Checkpoint | None:
    """Return the folder's checkpoint, or None if it has none. Raises FollowRefused if it is not one of ours."""
    path = folder / NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FollowRefused(f"{path} cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(_MAX_BYTES + 1)
    try:
        checkpoint = Checkpoint.model_validate_json(content)
    except ValidationError:
        checkpoint = None
    if checkpoint is None or (checkpoint.last is not None and checkpoint.last_name is None):
        raise FollowRefused(f"{path} is no checkpoint that this release can read")
    return checkpoint


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace the folder's checkpoint, durably. Raises OSError; then the old one is still there."""
    temporary = folder / f"{NAME}.new"
    # What a killed follower left of a new checkpoint is of no use, and what somebody else put there is not opened.
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
        file.write(checkpoint.model_dump_json().encode())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Force what the folder holds by which name to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one follower that writes to `folder`. Raises FollowRefused if there is another."""
    path = folder / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise FollowRefused(f"{path} cannot be opened: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FollowRefused(f"another follower writes to {folder}") from None
        yield
    finally:
        os.close(descriptor)
