"""End the engine's processes when the worker that started them stops or dies.

vLLM runs the model in processes of its own. A worker killed with SIGKILL cannot stop them, and EngineCore would live
on with the accelerator's memory in its hands, so that the next worker cannot start. Linux can deliver a signal to a
process when its parent dies (PR_SET_PDEATHSIG), but the process must ask for it itself, and it is a child of vLLM's
code, not of ours. Two ways lead into it; each is enough while a worker serves:

1. `bound_children` puts a marker into the configuration that multiprocessing sends to a spawned child. The child
   unpickles it before it imports the model code, about a tenth of a second after it began, and unpickling the marker
   calls `_die_with`. This closes the many seconds of imports in which no plugin is loaded yet. Children of the child
   inherit the marker.
2. vLLM calls `die_with_parent` in every process it starts, by way of a plug-in (`worker_gpu.engines.plugin`). It
   needs this project to be installed, and comes only after EngineCore has shaken hands with its parent, for which
   a child alone would wait five minutes; but it depends on no detail of multiprocessing.

psutil is imported only by the functions for an orderly stop, so that the marker is read without delay.

The signal is sent when the *thread* that started the child ends, not the process. The engine must therefore be
started from a thread that lives as long as the engine.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tasks.logs import get_logger

if TYPE_CHECKING:
    import psutil

PR_SET_PDEATHSIG = 1  # From <linux/prctl.h>.
MARKER = "metaqore_bond"
POLL_S = 0.02

logger = get_logger(__name__)

#: The process that hosts AsyncLLM. It loads vLLM's plugins as well, and must not be tied to whatever started it.
_host_pids: set[int] = set()


def die_with_parent() -> None:
    """Tie this process's life to its parent's, if multiprocessing started it and it does not host the engine."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and os.getpid() not in _host_pids:
        _die_with(parent.pid)


@contextmanager
def bound_children() -> Iterator[None]:
    """Tie the life of all processes that are spawned in this block to the calling thread's.

    Only children started with the method `spawn` are reached. Call it in the process that hosts the engine.
    """
    _host_pids.add(os.getpid())
    # Private, but the same from Python 3.4 to 3.14, and the only part of a child's pickle that is both ours to write
    # and read before the child imports its target.
    configuration: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # noqa: SLF001
    configuration[MARKER] = _Bond()
    try:
        yield
    finally:
        del configuration[MARKER]


class _Bond:
    """A marker whose unpickling ties the reading process to the process that pickled it."""

    def __reduce__(self) -> tuple[Callable[[int], _Bond], tuple[int]]:
        return _bind, (os.getpid(),)


def _bind(parent_pid: int) -> _Bond:
    _die_with(parent_pid)
    return _Bond()


def _die_with(parent_pid: int) -> None:
    """Ask Linux for SIGKILL at the parent's death; end at once if it is dead already."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # A parent that died before the call sends nothing: its children belong to another process by now.
    if os.getppid() != parent_pid:
        os._exit(1)


def with_descendants(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that exist, each followed by its children and theirs."""
    import psutil

    family: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            family += [process, *process.children(recursive=True)]
    return family


def end(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    """Wait for processes that were told to end. Those still running after `timeout_s` seconds are killed.

    Takes up to twice `timeout_s`, as a process that holds much memory needs a while to end even then.
    """
    import psutil

    stubborn = still_running(processes, timeout_s)
    for process in stubborn:
        logger.warning("an engine process did not end by itself, and is killed", pid=process.pid)
        with suppress(psutil.NoSuchProcess):
            process.kill()
    still_running(stubborn, timeout_s)


def still_running(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for processes to end; return those that have not after `timeout_s` seconds.

    Zombies have ended: in a container without an init process, nobody may ever collect them.
    """
    deadline = time.monotonic() + timeout_s
    while running := [process for process in processes if _is_running(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    return running


def _is_running(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
