"""Become another program, one that ends when the process that started it does.

Run as `python launcher.py PARENT_PID SIGNAL COMMAND…`. Linux sends SIGNAL to a process when its parent dies if the
process asked for it (PR_SET_PDEATHSIG), and keeps to that over `exec`. So nothing is left running when bin/run is
killed with SIGKILL. This is a program of its own because code between fork and exec is unsafe in a process with
threads. The signal is sent when the *thread* that started this one ends: start it from the main thread.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1  # From <linux/prctl.h>.


def main() -> None:
    """Ask for the signal, then become the command."""
    parent, number, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    # A parent that died before the call sends nothing: its children belong to another process by now.
    if os.getppid() != int(parent):
        sys.exit("bin/run has ended already")
    try:
        os.execv(command[0], command)  # noqa: S606  the commands are in services.py
    except OSError as error:
        sys.exit(f"{command[0]} cannot be started: {error.strerror}")


if __name__ == "__main__":
    main()
