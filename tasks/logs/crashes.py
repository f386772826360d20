"""What is left of a process that ends by surprise: where it was, and nothing of what it worked on.

Python prints an exception that nobody caught with its text, which may quote a prompt; the hooks here log it as any other. A
process that is killed by a signal has its frames printed, by file and line, without values. The kernel would write a core dump,
in which the whole memory is: the limit on its size is set to nothing, and so is what may go into one, as the limit does not hold
where the kernel hands dumps to a program (systemd-coredump, apport). Child processes inherit both.
"""

from __future__ import annotations

import faulthandler
import resource
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tasks.logs.loggers import get_logger

logger = get_logger(__name__)
#: Which kinds of memory the kernel puts into this process's core dump, as bits; see core(5).
_COREDUMP_FILTER = Path("/proc/self/coredump_filter")


def install(*, core_dumps: bool) -> None:
    """Have exceptions that nobody catches logged without their text, and forbid core dumps unless they are wanted."""
    sys.excepthook = _in_main_thread
    threading.excepthook = _in_thread
    sys.unraisablehook = _unraisable
    # A process without standard error has nowhere to write to.
    with suppress(OSError, ValueError, RuntimeError, AttributeError):
        faulthandler.enable()
    if not core_dumps:
        _forbid_core_dumps()


def _forbid_core_dumps() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    with suppress(OSError):
        _COREDUMP_FILTER.write_text("0", "ascii")


def _in_main_thread(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
    else:
        logger.critical("nobody caught an exception", exc_info=error)


def _in_thread(arguments: threading.ExceptHookArgs) -> None:
    name = arguments.thread.name if arguments.thread is not None else None
    logger.error("an exception ended a thread", thread=name, exc_info=arguments.exc_value)


def _unraisable(arguments: sys.UnraisableHookArgs) -> None:
    # Not the object it happened in, whose repr may be anything.
    logger.error("an exception could not be raised", exc_info=arguments.exc_value)
