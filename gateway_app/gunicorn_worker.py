"""gunicorn's threaded worker, which lets go of sockets that the application has taken (see streaming.pump)."""

from __future__ import annotations

import errno
import time
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

_NO_FILES_LEFT = (errno.EMFILE, errno.ENFILE)
#: How long clients wait to be let in while every file is taken.
_FULL_S = 0.1


class Worker(ThreadWorker):
    """Serves requests in threads, and streams without. `stops_at` is when a graceful stop has to be over."""

    stops_at = 0.0
    _full = False

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Note when the graceful stop began."""
        if self.alive:
            self.stops_at = time.monotonic() + self.cfg.graceful_timeout
        super().handle_exit(sig, frame)

    def accept(self, listener: Any) -> None:
        """Take a connection in. With no file left for it, it waits: failing would end every stream there is."""
        try:
            super().accept(listener)
            self._full = False
        except OSError as error:
            if error.errno not in _NO_FILES_LEFT:
                raise
            if not self._full:
                self.log.warning("no file is left for another connection: raise the limit of open files")
            self._full = True
            time.sleep(_FULL_S)

    def finish_request(self, conn: Any, fs: Any) -> None:
        """Forget a connection whose socket is gone; the loop that took it closes it."""
        if conn.sock.fileno() == -1:
            self.nr_conns -= 1
        else:
            super().finish_request(conn, fs)
