"""`var/`: all that bin/run keeps, readable by its owner only.

`secrets/` and `api-key` are worth protecting, `gateway.db` and `redis/` hold requests; `log/` has a file a process;
`run/` says what runs now and is empty when nothing does, but for the lock. The lock is what allows one bin/run in a
checkout: the kernel gives it back however its holder ends, so it is never stale. Its holder writes into it who it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tasks.errors import ConfigurationError

NEEDED_MB = 200
LOG_LIMIT_BYTES = 10 * 2**20
TAIL_LINES = 20


class AlreadyRunning(ConfigurationError):
    """The gateway is already running in this folder."""

    hint = "Stop that one first (Ctrl-C there), or use it as it is."


@dataclass(frozen=True, slots=True)
class Folder:
    """The paths under `var/` of the project at `root`."""

    root: Path

    @property
    def path(self) -> Path:
        """Return `var/` itself."""
        return self.root / "var"

    @property
    def run(self) -> Path:
        """Return the folder of what runs now."""
        return self.path / "run"

    @property
    def secrets(self) -> Path:
        """Return the folder of secrets."""
        return self.path / "secrets"

    @property
    def api_key(self) -> Path:
        """Return the file of the API key that the first curl uses."""
        return self.path / "api-key"

    def log(self, name: str) -> Path:
        """Return the file that a process's output goes to."""
        return self.path / "log" / f"{name}.log"

    def make(self, needed_mb: int = NEEDED_MB) -> None:
        """Make the folders. Raises ConfigurationError if they cannot be made or less than `needed_mb` is free."""
        try:
            for folder in (self.path, self.run, self.secrets, self.path / "log", self.path / "redis"):
                folder.mkdir(mode=0o700, exist_ok=True)
            self.path.chmod(0o700)
            free_mb = shutil.disk_usage(self.path).free // 10**6
        except OSError as error:
            raise ConfigurationError(f"{self.path} cannot be used: {error.strerror}") from None
        if free_mb < needed_mb:
            raise ConfigurationError(
                f"only {free_mb} MB are free in {self.path}, and running needs {needed_mb} MB; make room there"
            )

    def open_log(self, name: str) -> IO[bytes]:
        """Return a process's log, to be appended to."""
        return open(self.log(name), "ab", opener=_private)

    def rotate_log(self, name: str) -> None:
        """Put a log that has grown large aside, in place of the one put aside before."""
        log = self.log(name)
        if log.exists() and log.stat().st_size > LOG_LIMIT_BYTES:
            log.replace(log.with_suffix(".log.1"))

    def log_tail(self, name: str) -> str:
        """Return the last lines of a process's log, indented."""
        try:
            lines = self.log(name).read_text("utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])

    def write_private(self, path: Path, content: str) -> None:
        """Replace a file by one that only its owner may read; readers see the old or the new one, whole."""
        temporary = path.with_name(path.name + ".new")
        with open(temporary, "w", encoding="utf-8", opener=_private) as file:
            file.write(content)
        temporary.replace(path)

    @contextmanager
    def lock(self) -> Iterator[IO[str]]:
        """Hold the lock, giving the file to write the holder into. Raises AlreadyRunning, naming the holder."""
        with open(self.run / "lock", "a+", encoding="utf-8", opener=_private) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise AlreadyRunning(f"the gateway is already running in {self.root}{_holder(file.read())}") from None
            write_holder(file, None)
            yield file
            file.truncate(0)


def write_holder(lock: IO[str], url: str | None) -> None:
    """Write into the lock who holds it, and where its gateway will be found once that is known."""
    lock.truncate(0)
    lock.write(json.dumps({"pid": os.getpid(), "url": url}))
    lock.flush()


def _holder(content: str) -> str:
    try:
        holder = json.loads(content)
        return f": process {holder['pid']}" + (f", {holder['url']}" if holder["url"] else ", still starting")
    except (ValueError, KeyError, TypeError):
        return ""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
