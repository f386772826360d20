"""A connection that goes on at once stays with its thread; one that pauses goes back, and is served all the same."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet import Gateway, own_services
from tests.services import wait_until

END_S = 60.0
ASK = b"GET /healthz HTTP/1.1\r\nHost: gateway\r\n\r\n"
#: Longer than a thread waits for the next request.
PAUSE_S = 0.5


@pytest.fixture
def port(tmp_path: Path, tiny_model: Path) -> Iterator[tuple[Gateway, int]]:
    """Return a gateway process that answers, and its port."""
    with own_services(tmp_path, tiny_model) as environment:
        gateway = Gateway(tmp_path / "gateway.log", os.environ | environment)
        port = int(gateway.url.rpartition(":")[2])
        try:
            wait_until(lambda: listens(port), END_S, "a gateway that listens")
            yield gateway, port
        finally:
            gateway.kill()


def listens(port: int) -> bool:
    """Tell whether it lets somebody in."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=END_S).close()
    except ConnectionRefusedError:
        return False
    return True


def answered(connection: socket.socket) -> bool:
    """Tell whether a whole answer with status 200 comes."""
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += connection.recv(4096) or b"\r\n\r\n"
    head, _, body = reply.partition(b"\r\n\r\n")
    length = next(int(line[16:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: "))
    while len(body) < length:
        body += connection.recv(4096)
    return head.startswith(b"HTTP/1.1 200")


def test_requests_on_one_connection(port: tuple[Gateway, int]) -> None:
    """One after the other, after a pause, and several sent at once."""
    gateway, number = port
    with socket.create_connection(("127.0.0.1", number), timeout=END_S) as connection:
        for pause_s in (0.0, 0.0, PAUSE_S, 0.0, PAUSE_S):
            time.sleep(pause_s)
            connection.sendall(ASK)
            assert answered(connection)
        # A thread that waits for more does not hold up the end.
        connection.sendall(ASK)
        assert answered(connection)
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(END_S) == 0
