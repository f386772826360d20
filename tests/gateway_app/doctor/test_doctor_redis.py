"""Every way in which a Redis can be set up wrongly, made real, is found; what may not be asked is unknown."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gateway_app.doctor import clocks, redis_server
from tests.gateway_app.doctor.conftest import Find
from tests.services import RedisServer, wait_until

PASSWORD = "hunter2-of-redis"


@pytest.fixture
def client(breakable_redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[redis.Redis]:
    """Return a client of the Redis that is configured, whose settings are put back afterwards."""
    monkeypatch.setenv("REDIS_URL", breakable_redis.url)
    with redis.Redis(port=breakable_redis.port, decode_responses=True) as client:
        before = {
            name: client.config_get(name)[name]
            for name in ("maxmemory-policy", "appendonly", "appendfsync", "maxmemory", "dir")
        }
        yield client
        for name, value in before.items():
            client.config_set(name, value)


def test_a_good_one(client: redis.Redis, find: Find) -> None:
    """Nothing is wrong with what a deployment should have."""
    client.config_set("appendfsync", "everysec")
    found = find(redis_server.examine)
    assert {name: finding.says for name, finding in found.items() if finding.status not in ("ok", "warn")} == {}
    assert {name for name, finding in found.items() if finding.status == "warn"} <= {"redis disk"}
    assert {"redis", "redis version", "redis writes", "redis eviction", "redis append-only file"} <= set(found)


@pytest.mark.parametrize(
    ("setting", "value", "name", "status", "remedy"),
    [
        ("maxmemory-policy", "allkeys-lru", "redis eviction", "fail", "maxmemory-policy noeviction"),
        ("maxmemory-policy", "volatile-ttl", "redis eviction", "fail", "maxmemory-policy noeviction"),
        ("appendonly", "no", "redis append-only file", "warn", "appendonly yes"),
        ("appendfsync", "no", "redis fsync", "warn", "appendfsync everysec"),
    ],
)
def test_a_wrong_setting(
    client: redis.Redis, find: Find, setting: str, value: str, name: str, status: str, remedy: str
) -> None:
    """It is found, with the command that corrects it."""
    client.config_set(setting, value)
    finding = find(redis_server.examine)[name]
    assert (finding.status, value in finding.says or value == "no") == (status, True)
    assert remedy in finding.remedy


def test_one_that_is_nearly_full(client: redis.Redis, find: Find) -> None:
    """Before it refuses requests."""
    client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.1))
    assert find(redis_server.examine)["redis memory"].status == "warn"
    client.config_set("maxmemory", 0)
    assert find(redis_server.examine)["redis memory"].status == "ok"


def test_one_that_cannot_save(client: redis.Redis, find: Find, tmp_path: Path) -> None:
    """Its folder is gone."""
    folder = tmp_path / "gone"
    folder.mkdir(mode=0o777)
    client.config_set("dir", str(folder))
    shutil.rmtree(folder)
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", 30, "a failed save")
    finding = find(redis_server.examine)["redis saving"]
    assert (finding.status, "rdb_last_bgsave_status" in finding.says) == ("fail", True)
    folder.mkdir(mode=0o777)
    client.config_set("dir", str(folder))
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok", 30, "a save")
    assert find(redis_server.examine)["redis saving"].status == "ok"


def test_a_replica(client: redis.Redis, find: Find, own_redis: RedisServer) -> None:
    """It lets nobody write; and one that does loses it."""
    client.replicaof("127.0.0.1", own_redis.port)
    try:
        found = find(redis_server.examine)
        assert "replica" in found["redis writes"].says
        assert found["redis writes"].status == "fail"
        client.config_set("replica-read-only", "no")
        assert "loses" in find(redis_server.examine)["redis writes"].says
        client.config_set("replica-read-only", "yes")
    finally:
        client.replicaof("NO", "ONE")


def test_an_access_list(client: redis.Redis, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CONFIG is refused INFO tells; where that is too, it is unknown; a user without rights cannot write."""
    rights = {
        "careful": ("*", ["-config"]),
        "silent": ("*", ["-config", "-info"]),
        "stranger": ("other:*", []),
    }
    found = {}
    for user, (keys, commands) in rights.items():
        client.acl_setuser(
            user, enabled=True, passwords=f"+{PASSWORD}", keys=[keys], categories=["+@all"], commands=commands
        )
        port = client.connection_pool.connection_kwargs["port"]
        monkeypatch.setenv("REDIS_URL", f"redis://{user}:{PASSWORD}@127.0.0.1:{port}/0")
        found[user] = find(redis_server.examine)
        client.acl_deluser(user)
    careful = found["careful"]
    told = [careful[f"redis {name}"].status for name in ("eviction", "append-only file", "fsync")]
    assert told == ["ok", "ok", "unknown"]
    silent = found["silent"]
    assert {silent[f"redis {name}"].status for name in ("version", "eviction", "memory", "saving")} == {"unknown"}
    assert silent["redis writes"].status == "ok"
    refused = found["stranger"]["redis writes"]
    assert (refused.status, "may not" in refused.says) == ("fail", True)
    assert PASSWORD not in str(found)


class Managed(RedisServer):
    """A Redis as hosts rent it out: nobody may see or change its configuration, which forgets things."""

    def command(self) -> list[str]:
        """Return the command that runs it."""
        words = super().command()
        words[words.index("--appendonly") + 1] = "no"
        words[words.index("--maxmemory-policy") + 1] = "volatile-lru"
        return [*words, "--rename-command", "CONFIG", ""]


def test_a_configuration_that_nobody_may_see(find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """What INFO tells is enough to find what is wrong."""
    server = Managed()
    try:
        server.start()
        monkeypatch.setenv("REDIS_URL", server.url)
        found = find(redis_server.examine)
    finally:
        server.close()
    assert (found["redis eviction"].status, found["redis append-only file"].status) == ("fail", "warn")
    assert "redis fsync" not in found


def test_a_wrong_password(client: redis.Redis, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused, and not shown."""
    port = client.connection_pool.connection_kwargs["port"]
    monkeypatch.setenv("REDIS_URL", f"redis://nobody:{PASSWORD}@127.0.0.1:{port}/0")
    finding = find(redis_server.examine)["redis"]
    assert (finding.status, "refuses" in finding.says, PASSWORD in str(finding)) == ("fail", True, False)


def test_no_password_on_a_network(find: Find, monkeypatch: pytest.MonkeyPatch, breakable_redis: RedisServer) -> None:
    """Another name of the loopback address stands for another host."""
    monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.2:{breakable_redis.port}/0")
    with redis.Redis(port=breakable_redis.port) as client:
        client.config_set("bind", "127.0.0.1 127.0.0.2") if _binds(client) else pytest.skip(
            "this Redis binds at its start"
        )
    finding = find(redis_server.examine)["redis access"]
    assert (finding.status, "no password" in finding.says) == ("warn", True)


def _binds(client: redis.Redis) -> bool:
    try:
        return bool(client.config_set("bind", "127.0.0.1"))
    except redis.ResponseError:
        return False


@pytest.mark.parametrize(("ahead_s", "status"), [(0.0, "ok"), (-3.0, "warn"), (90.0, "fail")])
@pytest.mark.parametrize("database_kind", ["postgresql"], indirect=True)
def test_this_hosts_clock(
    client: redis.Redis,
    find: Find,
    migrated_url: str,
    monkeypatch: pytest.MonkeyPatch,
    ahead_s: float,
    status: str,
) -> None:
    """It is compared with both services'. Only ours can be set here, so it is ours that is wrong."""
    assert client.ping()
    monkeypatch.setenv("DATABASE_URL", migrated_url)
    wall_clock = time.time
    monkeypatch.setattr("gateway_app.doctor.clocks.time.time", lambda: wall_clock() + ahead_s)
    found = find(clocks.examine)
    assert {name: finding.status for name, finding in found.items()} == {
        "clock of redis": status,
        "clock of database": status,
    }
