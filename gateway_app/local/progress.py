"""What bin/run says while it works: lines that stay, and one line that changes while something is waited for."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress

#: Without a terminal, a wait is told of this often.
REPEAT_S = 15.0


class Progress:
    """Writes to standard error, from any thread; standard output is for answers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()
        self._waiting = False
        self._last, self._last_at = "", 0.0

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._write(("\r\033[K" if self._waiting else "") + text + "\n")
            self._waiting = False

    def wait(self, what: str, seconds: float) -> None:
        """Show what is being waited for, and for how long already."""
        with self._lock:
            line = f"waiting for: {what} ({seconds:.0f} s)"
            if self._terminal:
                self._write(f"\r\033[K{line}")
                self._waiting = True
            elif what != self._last or time.monotonic() - self._last_at >= REPEAT_S:
                self._write(line + "\n")
                self._last, self._last_at = what, time.monotonic()

    def clear(self) -> None:
        """Take the changing line away: the wait is over."""
        with self._lock:
            if self._waiting:
                self._write("\r\033[K")
            self._waiting = False

    @staticmethod
    def _write(text: str) -> None:
        # A terminal that was closed, or a full disk: nobody reads this, and that is no reason to fail.
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()
