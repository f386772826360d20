"""A proxy before PostgreSQL that loses the answer to a COMMIT, as a network does at the worst moment."""

from __future__ import annotations

import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal

from sqlalchemy.engine import make_url

#: What happens to a COMMIT: it is carried out and its answer lost; it never arrives; it arrives when it is let through.
Fate = Literal["answer lost", "never arrives", "arrives late"]
_NAME = ".s.PGSQL.5432"


class CommitProxy:
    """Listens on a Unix socket of its own and passes everything on to the server of `url`, at `self.url`."""

    def __init__(self, url: str) -> None:
        parts = make_url(url)
        self._server = str(Path(str(parts.query["host"])) / _NAME)
        self._folder = tempfile.TemporaryDirectory(prefix="metaqore-proxy-")
        self.url = parts.set(query={"host": self._folder.name}).render_as_string(hide_password=False)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(Path(self._folder.name) / _NAME))
        self._listener.listen(50)
        self._sockets = [self._listener]
        #: The fate of the next COMMIT; it is used up by it.
        self.fate: Fate | None = None
        #: Lets the COMMIT through that arrives late.
        self.let_through = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End every connection."""
        self.let_through.set()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._folder.cleanup()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                self._sockets += [client, server]
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while content := client.recv(65536):
                fate, self.fate = (self.fate, None) if b"COMMIT" in content else (None, self.fate)
                if fate is None:
                    server.sendall(content)
                    continue
                # From here on the client hears nothing more.
                client.shutdown(socket.SHUT_RDWR)
                if fate == "arrives late":
                    self.let_through.wait()
                if fate != "never arrives":
                    server.sendall(content)
                    return
                break
            server.shutdown(socket.SHUT_RDWR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while content := server.recv(65536):
                client.sendall(content)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
