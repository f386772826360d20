"""Serving metrics never stops a process: ports that are taken are passed over, what cannot be served is not."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import requests

from tasks.metrics import serving
from tasks.metrics.making import told_by
from tests.services import free_port

REGISTRY = told_by("housekeeper")


@pytest.fixture
def port() -> Iterator[int]:
    """Return a port that is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        yield taken.getsockname()[1]


def asked(port: int) -> str:
    """Return what is served on a port."""
    return requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text


def test_it_serves_until_it_ends() -> None:
    """And then the port is free again, at once."""
    port = free_port()
    for _ in range(2):
        end = serving.serve(REGISTRY, "127.0.0.1", port)
        assert "metaqore_housekeeping_leader" in asked(port)
        end()
        with pytest.raises(requests.ConnectionError):
            asked(port)


def test_several_processes_of_one_setting(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the next port that is free; with none left, one serves nothing, and goes on."""
    monkeypatch.setattr(serving, "PORTS", 3)
    with ExitStack() as ends:
        for _ in range(2):
            ends.callback(serving.serve(REGISTRY, "127.0.0.1", port))
        assert "metaqore_build_info" not in asked(port + 1)
        assert asked(port + 1).splitlines()[0] == asked(port + 2).splitlines()[0]
        serving.serve(REGISTRY, "127.0.0.1", port)()


def test_a_port_or_a_host_that_cannot_be(port: int) -> None:
    """No port, an address that is not this machine's, a name that nobody knows, the last port: nothing is raised."""
    serving.serve(REGISTRY, "127.0.0.1", 0)()
    serving.serve(REGISTRY, "192.0.2.1", port)()
    serving.serve(REGISTRY, "no such host.invalid", port)()
    serving.serve(REGISTRY, "127.0.0.1", 65535)()
