"""What becomes of connections when a gateway process is told to end: those before are served, those after are refused."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from tests.fleet import Gateway, own_services
from tests.services import wait_until

END_S = 60.0
#: A request that is not whole yet, and its rest.
BEGUN, REST = b"GET /healthz HTTP/1.1\r\nHost: gate", b"way\r\n\r\n"
OK = b"HTTP/1.1 200"


@pytest.fixture
def gateway(tmp_path: Path, tiny_model: Path) -> Iterator[Gateway]:
    """Return a gateway process that answers."""
    with own_services(tmp_path, tiny_model) as environment:
        gateway = Gateway(tmp_path / "gateway.log", os.environ | environment)
        try:
            wait_until(lambda: answers(gateway), END_S, "a gateway that answers")
            yield gateway
        finally:
            gateway.kill()


def answers(gateway: Gateway) -> bool:
    """Tell whether it serves HTTP."""
    try:
        return requests.get(f"{gateway.url}/healthz", timeout=10).ok
    except requests.ConnectionError:
        return False


def connect(gateway: Gateway) -> socket.socket:
    """Open a connection."""
    return socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=END_S)


def refuses(gateway: Gateway) -> bool:
    """Tell whether it lets nobody in."""
    try:
        connect(gateway).close()
    except ConnectionRefusedError:
        return True
    return False


def test_while_a_request_is_finished_others_are_refused(gateway: Gateway) -> None:
    """They would wait for as long as the slowest stream takes, and be reset then; refused, they go elsewhere at once."""
    with connect(gateway) as slow:
        slow.sendall(BEGUN)
        gateway.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(gateway), END_S, "connections that are refused")
        assert gateway.process.poll() is None
        slow.sendall(REST)
        assert slow.recv(len(OK)) == OK
    assert gateway.process.wait(END_S) == 0


def test_connections_that_wait_to_be_let_in_are_served(gateway: Gateway) -> None:
    """The kernel has accepted them already, so their clients believe that they are being served."""
    (worker,) = psutil.Process(gateway.process.pid).children()
    worker.suspend()
    waiting = [connect(gateway) for _ in range(20)]
    for client in waiting:
        client.sendall(BEGUN + REST)
    gateway.process.send_signal(signal.SIGTERM)
    worker.resume()
    for client in waiting:
        with client:
            assert client.recv(len(OK)) == OK
    assert gateway.process.wait(END_S) == 0
