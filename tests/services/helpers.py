"""What every test of a real service needs: the package it comes in, a free port, and patience."""

from __future__ import annotations

import importlib.util
import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

import psutil
import pytest

T = TypeVar("T")
#: Outside the range the kernel takes client ports from. Inside it, a client that knocks on a stopped server's port may
#: be given that very port, connect to itself, and keep the server from coming back.
PORTS = range(20_000, 32_000)
POLL_S = 0.01
#: A look at a service takes processor time of those that are to change it; so a pause is this many times as long as the
#: look before it, within these bounds.
PAUSES_PER_LOOK = 3
LONGEST_PAUSE_S = 0.2


def require(module_name: str) -> Path:
    """Return the folder of package `module_name`, without importing it.

    Where it is missing the test is skipped, or fails.
    """
    spec = importlib.util.find_spec(module_name)
    if spec is None or not spec.submodule_search_locations:
        missing(f"package {module_name} is not installed")
    return Path(spec.submodule_search_locations[0])


def missing(message: str) -> NoReturn:
    """Skip the test, or fail it if the environment says CI: there, nothing may be left out."""
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def free_port() -> int:
    """Return a TCP port of the loopback address on which nobody listens, below the kernel's client ports."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def wait_until(predicate: Callable[[], T], timeout_s: float, what: str) -> T:
    """Return the first true value of `predicate`, called again and again.

    Raises TimeoutError, which says `what` did not come.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        began = time.monotonic()
        if value := predicate():
            return value
        looked = time.monotonic()
        if looked > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(min(max(POLL_S, PAUSES_PER_LOOK * (looked - began)), LONGEST_PAUSE_S))


def processes_in(folder: Path) -> list[psutil.Process]:
    """Return every process that works in `folder`, whoever its parent is by now. One that has ended is none."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found
