"""Whether the client of a request is still there, found by looking at its socket."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Mapping
from typing import Any

#: Where servers put the client's socket: gunicorn, and Flask's own for development.
_KEYS = ("gunicorn.socket", "werkzeug.socket")
#: Beside these, a poll always tells of errors. Linux tells of an end that lies behind unread data, too.
_EVENTS = select.POLLIN | getattr(select, "POLLRDHUP", 0)


def watch(environ: Mapping[str, Any]) -> Callable[[], bool]:
    """Return a function that tells whether the client has closed its connection.

    It never blocks and reads nothing. Where the server shows no plain socket, as with TLS, it says that the client is
    there; then only writing shows that it is not.
    """
    connection = next((environ[key] for key in _KEYS if key in environ), None)
    if type(connection) is not socket.socket:
        return lambda: False
    poll = select.poll()
    poll.register(connection, _EVENTS)

    def gone() -> bool:
        for _, events in poll.poll(0):
            if events & ~select.POLLIN:
                return True
            try:
                return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True
        return False

    return gone
