"""A server process that never outlives the tests.

It works without root and as root. However the test process ends, the kernel itself signals the server then
(`PR_SET_PDEATHSIG`), so that even `kill -9` of pytest leaves nothing running. The signal is sent when the *thread* that
started the server ends, so servers are started from pytest's main thread, where fixtures run.

A server's data lies in a temporary folder, removed when it is closed. Its maker holds a lock on it: a folder that is
not locked belongs to a test process that was killed, and is removed by the next one that makes a server.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from tests.services.helpers import wait_until

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
FOLDER = "metaqore-tests-"
#: A folder younger than this may just be waiting for its maker to lock it.
LEFT_OVER_AGE_S = 60.0

#: Becomes the server, after asking the kernel to signal it when the process that started it has ended. This is a
#: program of its own because `preexec_fn` is not safe in a process with threads. The user changes first, since that
#: change would cancel the request.
_LAUNCHER = """
import ctypes, os, sys
parent, death_signal, uid, gid = map(int, sys.argv[1:5])
if uid != os.getuid():
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
PR_SET_PDEATHSIG = 1
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
    sys.exit("prctl failed")
if os.getppid() != parent:
    sys.exit("the parent has ended already")
os.execv(sys.argv[5], sys.argv[5:])
"""


class Server:
    """A server process with a folder of its own, ended and cleaned up with the process that made it."""

    name: str
    #: What ends the server cleanly but at once, without waiting for clients.
    stop_signal = signal.SIGTERM
    #: What the kernel sends when the test process is gone.
    death_signal = signal.SIGKILL

    def __init__(self) -> None:
        _remove_left_overs()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{self.name}-"))
        self._folder_lock = _lock(self.folder)
        self._maker = os.getpid()
        self.uid, self.gid = os.getuid(), os.getgid()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def __enter__(self) -> Self:
        """Start it, for as long as the block runs."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Return the id of the running process, None when stopped."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the server on its data, and return once it answers. Raises RuntimeError with its log if it does not."""
        if self._process is not None and self._process.poll() is None:
            raise RuntimeError(f"{self.name} is running already")
        owner = (os.getpid(), int(self.death_signal), self.uid, self.gid)
        with (self.folder / "log").open("ab") as log:
            process = self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCHER, *map(str, owner), *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops its servers itself.
            )
        try:
            wait_until(lambda: process.poll() is not None or self.answers(), START_TIMEOUT_S, f"{self.name} to answer")
        except TimeoutError as error:
            self.kill()
            raise RuntimeError(f"{error}: {self.log()}") from None
        if process.returncode is not None:
            raise RuntimeError(f"{self.name} ended with {process.returncode} as it started: {self.log()}")

    def kill(self) -> None:
        """Kill the server as `kill -9` does: it has no chance to save anything."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Stop the server cleanly, keeping its data for the next start."""
        self._end(self.stop_signal)

    def close(self) -> None:
        """Stop the server if it runs, and remove its data. A fork of the test process has no say in this."""
        if self._folder_lock is None or os.getpid() != self._maker:
            return
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._folder_lock)
        self._folder_lock = None
        atexit.unregister(self.close)

    def log(self) -> str:
        """Return the end of what the server wrote."""
        return (self.folder / "log").read_text("utf-8", errors="replace")[-2000:]

    def command(self) -> list[str]:
        """Return the command that runs the server in the foreground."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Tell whether the server takes commands."""
        raise NotImplementedError

    def _end(self, with_signal: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(with_signal)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the lock on `folder` until it is closed, or None if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_left_overs() -> None:
    """Remove the folders of test processes that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        try:
            if folder.stat().st_mtime > time.time() - LEFT_OVER_AGE_S:
                continue
            descriptor = _lock(folder)
        except OSError:  # Another user's, or removed this moment.
            continue
        if descriptor is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)
