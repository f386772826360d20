"""A client that has closed its connection is gone; one that only says nothing, or too much, is there."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from gateway_app.streaming import presence
from tests.services import wait_until

RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return both ends of a TCP connection: the client's and the server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        with client, server:
            yield client, server


def watch(server: socket.socket, key: str = "gunicorn.socket") -> Callable[[], bool]:
    """Watch the client as a view does."""
    return presence.watch({key: server, "REQUEST_METHOD": "POST"})


@pytest.mark.parametrize("key", ["gunicorn.socket", "werkzeug.socket"])
def test_a_client_that_waits_is_there(pair: tuple[socket.socket, socket.socket], key: str) -> None:
    """However often one looks, and looking takes nothing away."""
    client, server = pair
    gone = watch(server, key)
    assert [gone() for _ in range(3)] == [False] * 3
    client.sendall(b"the next request")
    wait_until(lambda: server.recv(16, socket.MSG_PEEK) == b"the next request", 5, "the data")
    assert [gone() for _ in range(3)] == [False] * 3
    assert server.recv(100) == b"the next request"


@pytest.mark.parametrize("before", [b"", b"something that nobody reads"])
@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
def test_a_client_that_left_is_gone(pair: tuple[socket.socket, socket.socket], how: str, before: bytes) -> None:
    """However it left, and whatever it had sent before."""
    client, server = pair
    gone = watch(server)
    client.sendall(before)
    if how == "shutdown":
        client.shutdown(socket.SHUT_WR)
    else:
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()
    wait_until(gone, 5, "the end to be seen")
    assert gone()


def test_a_socket_that_the_server_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    """Nobody can be answered there."""
    _, server = pair
    gone = watch(server)
    server.close()
    assert gone()


@pytest.mark.parametrize("environ", [{}, {"gunicorn.socket": None}, {"gunicorn.socket": "no socket"}])
def test_a_server_that_shows_no_socket(environ: dict[str, object]) -> None:
    """Then everybody is taken to be there: only writing tells."""
    assert presence.watch(environ)() is False
