"""Run one process of the Procfile under honcho, so that all of them can finish what they do.

    python -m gateway_app.local.together COMMAND…

honcho passes SIGTERM on to the group of every process, and five seconds after the first of them has ended it kills the
others. Flower ends at once; so a worker would be killed in the middle of its requests. Under this program

- the command alone gets the signal, once, as from systemd: not the engine's processes, which it still needs;
- the process ends only when the commands of all others have ended too, so that none of them is killed.

A command that ends by itself is not waited with: honcho then ends the others, as it should. Whoever kills this program
kills the command.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

from gateway_app.local import processes

_POLL_S = 0.1


def main() -> None:
    """Run the command; end with its exit status, as a shell gives it."""
    program, *arguments = sys.argv[1:]
    path = shutil.which(program)
    if path is None:
        sys.exit(f"error: {program} is not on the PATH; activate the virtual environment that the gateway is in")
    command = processes.start(
        (path, *arguments),
        folder=Path.cwd(),
        environment=os.environ,
        log=sys.stdout.buffer,
        death_signal=signal.SIGKILL,
    )
    asked_to_end = False

    def pass_on(_number: int, _frame: object) -> None:
        nonlocal asked_to_end
        if not asked_to_end:
            asked_to_end = True
            command.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    status = command.wait()
    while asked_to_end and _others_run():
        time.sleep(_POLL_S)
    sys.exit(status if status >= 0 else 128 - status)


def _others_run() -> bool:
    """Tell whether another command of the same honcho runs.

    honcho has a process of its own for each, whose child is the shell that this program has replaced.
    """
    try:
        honcho = psutil.Process().parents()[1]
        shells = [shell for relay in honcho.children() for shell in relay.children()]
        return any(shell.children() for shell in shells)
    except psutil.NoSuchProcess:
        # Something has just ended, so it is worth another look.
        return True


if __name__ == "__main__":
    main()
