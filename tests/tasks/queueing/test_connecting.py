"""Every kind of client finds its server: with a password, over TLS, and through Sentinel, when the master is another."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
import redis
from kombu.exceptions import OperationalError

from tasks.errors import QueueUnavailable
from tasks.queueing.connecting import connect, connect_async
from tasks.queueing.properties import record_of
from tasks.queueing.publisher import Publisher
from tests.services import RedisServer, free_port, wait_until
from tests.tasks.queueing.broker import A, Broker, Consumer, configured, queued

MASTER = "mq-master"


class Replica(RedisServer):
    """A Redis that follows another."""

    def __init__(self, of: RedisServer) -> None:
        super().__init__()
        self._of = of.port

    def command(self) -> list[str]:
        """Return the command that runs it."""
        return [*super().command(), "--replicaof", "127.0.0.1", str(self._of), "--repl-diskless-sync-delay", "0"]


class Sentinel(RedisServer):
    """One Sentinel that watches a master, and decides alone."""

    name = "sentinel"

    def __init__(self, master: RedisServer) -> None:
        super().__init__()
        self._master = master.port

    def command(self) -> list[str]:
        """Return the command that runs it on a file of its own, which it writes to."""
        file = self.folder / "sentinel.conf"
        file.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.folder}\n"
            f"sentinel monitor {MASTER} 127.0.0.1 {self._master} 1\n"
            f"sentinel down-after-milliseconds {MASTER} 300\nsentinel failover-timeout {MASTER} 2000\n"
        )
        if self.uid:
            file.chmod(0o666)
        return [str(self._executable), str(file), "--sentinel"]


@pytest.fixture
def servers() -> Iterator[tuple[RedisServer, Replica, Sentinel]]:
    """Return a master, its replica, and the Sentinel that watches them."""
    started: list[RedisServer] = []
    try:
        master = RedisServer()
        started.append(master)
        master.start()
        replica, sentinel = Replica(master), Sentinel(master)
        started += [replica, sentinel]
        replica.start()
        sentinel.start()
        yield master, replica, sentinel
    finally:
        for server in reversed(started):
            server.close()


def test_a_failover(servers: tuple[RedisServer, Replica, Sentinel], monkeypatch: pytest.MonkeyPatch) -> None:
    """The master is killed. Publisher, consumer, leases and streams go on with the one that Sentinel makes of its replica."""
    master, replica, sentinel = servers
    url = f"sentinel://127.0.0.1:{sentinel.port}/0?master_name={MASTER}"
    with redis.Redis(port=sentinel.port) as watching:
        known: Any = lambda: watching.sentinel_slaves(MASTER)  # noqa: E731
        wait_until(lambda: [one for one in known() if one["master-link-status"] == "ok"], 30, "the replica to follow")
    with configured(url, 60, monkeypatch, connect(url, 5)) as broker:
        leases, lost = broker.leases("one", 0.3)
        consumer = Consumer(broker, holder="one")
        before = broker.publish()
        assert consumer.take(1) == [before]
        leases.hold(before, record_of(consumer.taken[0]))
        wait_until(lambda: renewed(replica, before, broker), 10, "the replica to have it")
        master.kill()
        after = queued(A)
        wait_until(lambda: publishes(broker.publisher, after), 30, "the new master")
        assert asyncio.run(answered(url)) == replica.port
        while after.tag not in consumer.tags:
            try:
                consumer.take(1, timeout_s=10)
            except consumer.connection.connection_errors:
                consumer = Consumer(broker, holder="one")
        first = renewed(replica, before, broker)
        wait_until(lambda: renewed(replica, before, broker) > first, 10, "a renewal there")
        assert lost == []
        broker.client.close()


def renewed(replica: RedisServer, tag: str, broker: Broker) -> float:
    """Return when the replica thinks that a lease was renewed; 0 if it does not know it."""
    with redis.Redis.from_url(replica.url) as client:
        return cast("float | None", client.zscore(broker.keys.named("leases"), tag)) or 0.0


def publishes(publisher: Publisher, message: Any) -> bool:
    """Tell whether the message was taken."""
    with suppress(QueueUnavailable):
        publisher.publish(message)
        return True
    return False


async def answered(url: str) -> int:
    """Return the port of the Redis that an asyncio client finds."""
    client = connect_async(url, 5)
    try:
        return int((await client.info("server"))["tcp_port"])
    finally:
        await client.aclose()


def test_a_password(own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway's client, the worker's, and kombu's all present it; without it none gets in."""
    password = "p@ss/w:rd;?#%"
    with redis.Redis.from_url(own_redis.url) as admin:
        admin.config_set("requirepass", password)
    try:
        url = f"redis://:{quote(password, safe='')}@127.0.0.1:{own_redis.port}/0"
        with configured(url, 60, monkeypatch) as broker:
            tag = broker.publish()
            assert Consumer(broker).take(1) == [tag]
            assert asyncio.run(answered(url)) == own_redis.port
        with connect(own_redis.url, 1) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    finally:
        with redis.Redis.from_url(own_redis.url, password=password) as admin:
            admin.config_set("requirepass", "")


class Listener:
    """Accepts connections on a port of its own and keeps the first bytes of each that says something."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", free_port()))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                with suppress(OSError):
                    # An attempt that was given up as it began says nothing.
                    if said := connection.recv(5):
                        self.heard.append(said)

    def close(self) -> None:
        """Stop listening."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Return a listener."""
    made = Listener()
    yield made
    made.close()


async def asked(url: str, listener: Listener) -> None:
    """Ask until the listener has heard something: the client would try again for seconds."""
    asking = asyncio.ensure_future(answered(url))
    while not listener.heard and not asking.done():
        await asyncio.sleep(0.01)
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking


#: A TLS record of type handshake (22), version 3.x: what a ClientHello is in.
HANDSHAKE = b"\x16\x03"


@pytest.mark.parametrize("client", ["gateway", "asyncio", "kombu"])
def test_tls(listener: Listener, client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rediss:// each client begins with a TLS handshake, and says nothing in the clear.

    The Redis of these tests cannot speak TLS, so what comes after the handshake is not tried here.
    """
    url = f"rediss://:secret@127.0.0.1:{listener.port}/0?ssl_cert_reqs=none"
    with suppress(redis.RedisError, OSError, OperationalError):
        if client == "gateway":
            connect(url, 2).ping()
        elif client == "asyncio":
            asyncio.run(asked(url, listener))
        else:
            with configured(url, 60, monkeypatch) as broker:
                broker.connection().transport.establish_connection()
    wait_until(lambda: listener.heard, 5, "a connection")
    assert [heard[:2] for heard in listener.heard] == [HANDSHAKE] * len(listener.heard)


def test_a_ca_file_is_used(listener: Listener, tmp_path: Path) -> None:
    """A file that is missing is an error before anything is sent."""
    url = f"rediss://127.0.0.1:{listener.port}/0?ssl_ca_certs={tmp_path / 'no.pem'}"
    with pytest.raises((redis.RedisError, OSError)):
        connect(url, 2).ping()
    assert listener.heard == []


def test_a_pool_is_bounded(redis_url: str) -> None:
    """However many threads use it; each waits for a free connection."""
    client = connect(redis_url, 5, connections=2)
    threads = [threading.Thread(target=lambda: [client.ping() for _ in range(20)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    with redis.Redis.from_url(redis_url) as other:
        mine = [one for one in other.client_list() if one["cmd"] == "ping"]
    assert 1 <= len(mine) <= 2
    client.close()
