"""Starting and ending one process with all its descendants, and the pid file that says which it is.

Each process leads a group of its own: a Ctrl-C in the terminal reaches bin/run alone, which ends the others in order,
and what a process leaves behind can be killed as a group.

A pid file may outlive its process (a power failure), and the number then belong to some other program. Titles are
useless to tell, as gunicorn and Celery write their own over their command line. So a process counts as ours if it
runs in the project's folder and was started when the pid file was written.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

LAUNCHER = Path(__file__).with_name("launcher.py")
#: The pid file is written right after the start; clocks of the kernel and the file system agree to far less than this.
START_TOLERANCE_S = 3.0
STALE_STOP_S = 10.0
EXIT_POLL_S = 0.05
#: A killed process is gone within milliseconds, unless the kernel waits for a disk in its name.
GROUP_END_S, GROUP_POLL_S = 2.0, 0.01


def start(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: IO[bytes],
    death_signal: signal.Signals = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start a command in `folder`. Call it from the main thread: the process gets `death_signal` when that ends."""
    launch = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), str(int(death_signal))]
    return subprocess.Popen(  # noqa: S603  the commands are in services.py
        [*launch, *command],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that `start` made, or whatever of its group outlived it. Leaves nothing running."""
    process.kill()
    # Its exit status is asked for first: until then it is one of its group.
    process.wait()
    kill_group(process.pid)


def kill_group(leader: int) -> None:
    """Kill what is left of a process's group, and wait until it is gone: until then it may hold a port."""
    deadline = time.monotonic() + GROUP_END_S
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
        while _runs(leader) and time.monotonic() < deadline:
            time.sleep(GROUP_POLL_S)
            os.killpg(leader, signal.SIGKILL)  # Again, as one of them may have been starting another.


def _runs(leader: int) -> bool:
    """Tell whether a process of the group runs. One whose exit status nobody has asked for yet does not."""
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def end_stale(pid_file: Path, folder: Path) -> bool:
    """End the process that an earlier bin/run left behind, if it still runs, and remove its pid file.

    It gets 10 seconds to end by itself, as Redis wants to save. Returns whether there was one.
    """
    process = _stale(pid_file, folder)
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
            with suppress(psutil.TimeoutExpired):
                process.wait(STALE_STOP_S)
        kill_group(process.pid)
    pid_file.unlink(missing_ok=True)
    return process is not None


def end_all_stale(run: Path, folder: Path) -> list[str]:
    """End all processes that have a pid file in `run`, as `end_stale` does. Returns the names of those there were."""
    return [file.stem for file in sorted(run.glob("*.pid")) if end_stale(file, folder)]


def _stale(pid_file: Path, folder: Path) -> psutil.Process | None:
    try:
        process = psutil.Process(int(pid_file.read_text("ascii")))
        written = pid_file.stat().st_mtime
        ours = abs(process.create_time() - written) < START_TOLERANCE_S and Path(process.cwd()) == folder.resolve()
    except (OSError, ValueError, psutil.Error):
        return None
    return process if ours else None
