"""Secrets: there, well formed, for nobody else to read, and the ones that what is stored was made with.

Whether two hosts have the same secrets shows in what the other one made: the newest request in SQL is under the master key,
the messages in the queue are signed.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa

from gateway_app.doctor.connecting import QUEUE_AWAY, reading, redis_client
from gateway_app.doctor.finding import Finding, fail, ok, unknown, warn
from tasks.crypto import DecryptionFailed, KeyWrapper, Signer
from tasks.errors import ConfigurationError, GatewayError, MessageRejected
from tasks.queueing.keys import QueueKeys
from tasks.queueing.message import MessageCodec
from tasks.settings import SECRET_NAMES, Settings

METAQORE_KEY = "metaqore_api_key"
OTHERS = stat.S_IRWXG | stat.S_IRWXO
_NEWEST = "SELECT request_id, data_key FROM requests WHERE data_key IS NOT NULL ORDER BY request_id DESC LIMIT 1"


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at each secret, then at the folder, then at what is stored."""
    yield from (_secret(settings, name) for name in SECRET_NAMES)
    if settings.metaqore.url is not None:
        yield _metaqore_key(settings)
    yield from _folder(settings)
    # Where one cannot be used, it is told above.
    with suppress(ConfigurationError):
        wrapper = KeyWrapper(settings.secrets.keys("master_key"))
        yield _master_key_fits(settings, wrapper)
        yield _signing_key_fits(settings, MessageCodec(Signer(settings.secrets.keys("signing_key")), wrapper))


def _secret(settings: Settings, name: str) -> Finding:
    label = f"secret {name}"
    try:
        count = len(settings.secrets.keys(name))
    except ConfigurationError as error:
        path = settings.secrets.directory / name
        elsewhere = f"copy {path} from another host or a backup"
        return fail(label, error.detail, elsewhere if path.exists() else f"flask secrets create, or {elsewhere}")
    if getattr(settings.secrets, name) is not None:
        return ok(label, "it comes from the environment")
    return _private(label, settings.secrets.directory / name, f"{count} key{'s' if count > 1 else ''}")


def _metaqore_key(settings: Settings) -> Finding:
    label = f"secret {METAQORE_KEY}"
    try:
        key = settings.secrets.metaqore_key()
    except ConfigurationError as error:
        return fail(label, error.detail, "write the API key into it, one line")
    path = settings.secrets.directory / METAQORE_KEY
    if key is None or not path.exists():
        return ok(label, "there is none" if key is None else "it comes from the environment")
    return _private(label, path, "one key")


def _private(label: str, path: Path, what: str) -> Finding:
    """Return whether a file is for its owner only, who is its folder's too."""
    try:
        found, owner = path.stat(), path.parent.stat().st_uid
    except OSError as error:
        return unknown(label, f"{path}: {error.strerror}")
    mode = f"{path} has mode {stat.S_IMODE(found.st_mode):03o}"
    if found.st_mode & stat.S_IRWXO:
        return fail(label, f"{mode}: everybody may use it", f"chmod 600 {path}")
    if found.st_mode & stat.S_IRWXG:
        # As orchestrators hand them out, to a group that has one member.
        return warn(label, f"{mode}: its group may use it", f"chmod 600 {path}")
    if found.st_uid != owner:
        says = f"{path} belongs to user {found.st_uid}, and its folder to user {owner}"
        return warn(label, says, f"chown {owner} {path}")
    return ok(label, f"{what}, for its owner only")


def _folder(settings: Settings) -> Iterator[Finding]:
    """Look at the folder, and at whatever else is in it."""
    folder = settings.secrets.directory
    if not folder.is_dir():
        return
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & OTHERS:
        yield warn("secrets folder", f"{folder} has mode {mode:03o}: others see what is in it", f"chmod 700 {folder}")
    else:
        yield ok("secrets folder", f"{folder}, for its owner only")
    for path in sorted(folder.iterdir()):
        if path.name not in (*SECRET_NAMES, METAQORE_KEY) and path.is_file():
            finding = _private(f"secret {path.name}", path, "it is there")
            if finding.status != "ok":
                yield finding


def _master_key_fits(settings: Settings, wrapper: KeyWrapper) -> Finding:
    label = "master key fits"
    try:
        with reading(settings) as connection:
            row = connection.execute(sa.text(_NEWEST)).one_or_none()
    except (sa.exc.SQLAlchemyError, GatewayError):
        return unknown(label, "the database cannot be asked for its newest request")
    if row is None:
        return ok(label, "nothing is stored yet")
    try:
        wrapper.unwrap(bytes(row.data_key), row.request_id)
    except DecryptionFailed:
        return fail(
            label,
            "the newest request is stored under another master key: this host cannot read what others store",
            f"copy {settings.secrets.directory / 'master_key'} from the other hosts",
        )
    return ok(label, "the newest request can be read")


def _signing_key_fits(settings: Settings, codec: MessageCodec) -> Finding:
    label = "signing key fits"
    keys = QueueKeys(settings.gateway.key_prefix)
    try:
        with redis_client(settings) as client:
            _, some = cast("Any", client.hscan(keys.named("messages"), count=1))
    except QUEUE_AWAY:
        return unknown(label, "Redis cannot be asked for a message")
    if not some:
        return ok(label, "no message waits")
    try:
        codec.decode(_envelope(next(iter(some.values()))))
    except (MessageRejected, ValueError, LookupError, TypeError):
        return fail(
            label,
            "a message in the queue was signed or sealed with other keys: its workers would refuse this host's, or it theirs",
            f"copy {settings.secrets.directory} from the other hosts",
        )
    return ok(label, "a message in the queue can be read")


def _envelope(record: bytes) -> Any:
    """Return what a message carries, as Redis has it: a line for the queue, then Celery's message, whose body is JSON."""
    return json.loads(json.loads(record.partition(b"\n")[2])["body"])[0][0]
