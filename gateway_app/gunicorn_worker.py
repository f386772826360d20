"""gunicorn's threaded worker, with two habits of its own.

It lets go of sockets that the application has taken (see streaming.pump). And a thread that has answered waits a moment
for the connection's next request, which often follows at once: giving the connection back to the main thread, which
watches it and gives it to a thread again, costs as much as a third of a request.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

_NO_FILES_LEFT = (errno.EMFILE, errno.ENFILE)
#: How long clients wait to be let in while every file is taken.
_FULL_S = 0.1
#: How long a thread waits for a connection's next request.
_NEXT_S = 0.2


class Worker(ThreadWorker):
    """Serves requests in threads, and streams without. `stops_at` is when a graceful stop has to be over."""

    stops_at = 0.0
    _full = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Half of the threads may wait so; the others are for new connections.
        self._waiting = threading.BoundedSemaphore(max(1, self.cfg.threads // 2))

    def handle(self, conn: Any) -> Any:
        """Serve a connection in this thread, until its client pauses."""
        kept = super().handle(conn)
        while kept is True and self.alive and self._goes_on(conn):
            kept = super().handle(conn)
        return kept

    def _goes_on(self, conn: Any) -> bool:
        """Tell whether the client sends something more within a moment."""
        if type(conn.sock) is not socket.socket or not self._waiting.acquire(blocking=False):
            return False
        try:
            poll = select.poll()
            poll.register(conn.sock, select.POLLIN)
            return bool(poll.poll(1000 * _NEXT_S))
        finally:
            self._waiting.release()

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

    def set_accept_enabled(self, enabled: bool) -> None:
        """Let connections in, or none for now; at the end, none any more.

        As long as it is open, the kernel goes on to take connections in, and resets them when the last stream has ended. So
        what it has taken by now is served, and whoever comes later is refused at once, and goes elsewhere.
        """
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive:
            for listener in self.sockets:
                count = -1
                while count != self.nr_conns:
                    count = self.nr_conns
                    self.accept(listener)
                listener.close()

    def finish_request(self, conn: Any, fs: Any) -> None:
        """Forget a connection whose socket is gone; the loop that took it closes it."""
        if conn.sock.fileno() == -1:
            self.nr_conns -= 1
        else:
            super().finish_request(conn, fs)
