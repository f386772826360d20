"""API keys: shown once when made, kept only as a keyed hash.

A key holds 32 random bytes, so one HMAC with a secret pepper is enough to protect the stored form: there is nothing
to guess, and a stolen table cannot be checked against guesses without the pepper.

Whose a key is, is remembered for a second a process, so that a busy client costs no query a request. So a key that is
revoked elsewhere may be taken for a second more; a request that slips through so is caught when it leaves the queue,
where nothing is remembered.
"""

from __future__ import annotations

import hmac
import secrets
import time
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tasks.db import Database, now
from tasks.errors import AdminRequired, Unauthenticated
from tasks.schema import api_keys

Role = Literal["member", "admin"]
PREFIX = "mq_"
#: A key of ours is 46 characters; anything much longer is not worth hashing.
MAX_LENGTH = 200
#: For how long a process believes what it read, in seconds, and of how many keys.
CACHE_S = 1.0
CACHE_SIZE = 4096
_FIND = sa.select(api_keys.c.key_id, api_keys.c.organization, api_keys.c.role).where(
    api_keys.c.key_hash.in_(sa.bindparam("hashes", expanding=True)), api_keys.c.revoked_at.is_(None)
)


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated client."""

    key_id: str
    organization: str
    role: Role = "member"

    def require_admin(self) -> None:
        """Raise AdminRequired unless the key may change what holds for its whole organization."""
        if self.role != "admin":
            raise AdminRequired


class ApiKeys:
    """Makes, checks and revokes keys. `peppers` are newest first; keys made with older ones still work."""

    def __init__(self, database: Database, peppers: tuple[bytes, ...]) -> None:
        self._database = database
        self._peppers = peppers
        self._known: dict[bytes, tuple[float, Caller]] = {}

    def create(self, organization: str, name: str, role: Role = "member") -> tuple[str, str]:
        """Return a new key's id and the key itself, which nobody can read again."""
        key, key_id = PREFIX + secrets.token_urlsafe(32), "key_" + secrets.token_hex(8)
        row = {
            "key_id": key_id,
            "organization": organization,
            "name": name,
            "key_hash": self._hash(key, self._peppers[0]),
            "created_at": now(),
            "role": role,
        }
        self._database.write(lambda connection: connection.execute(sa.insert(api_keys), row) and None)
        return key_id, key

    def authenticate(self, authorization: str | None) -> Caller:
        """Return the caller of an `Authorization: Bearer KEY` header. Raises Unauthenticated."""
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key or len(key) > MAX_LENGTH:
            raise Unauthenticated
        newest = self._hash(key, self._peppers[0])
        # Taken before reading: what is read may be older than the moment it arrives.
        at = time.monotonic()
        known = self._known.get(newest)
        if known is not None and at - known[0] < CACHE_S:
            return known[1]
        hashes = [newest, *(self._hash(key, pepper) for pepper in self._peppers[1:])]
        row = self._database.read(lambda connection: connection.execute(_FIND, {"hashes": hashes}).one_or_none())
        if row is None:
            raise Unauthenticated
        if len(self._known) >= CACHE_SIZE:
            self._known.clear()
        self._known[newest] = at, (caller := Caller(row.key_id, row.organization, row.role))
        return caller

    def revoke(self, key_id: str) -> bool:
        """Make the key useless from now on. Returns False if there is no such key in use."""

        def work(connection: Connection) -> bool:
            statement = sa.update(api_keys).where(api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None))
            return connection.execute(statement.values(revoked_at=now())).rowcount == 1

        revoked = self._database.write(work)
        self._known.clear()
        return revoked

    def all(self) -> list[Row[tuple[object, ...]]]:
        """Return every key's id, organization, name, role and dates, oldest first."""
        columns = (
            api_keys.c.key_id,
            api_keys.c.organization,
            api_keys.c.name,
            api_keys.c.role,
            api_keys.c.created_at,
            api_keys.c.revoked_at,
        )
        query = sa.select(*columns).order_by(api_keys.c.created_at, api_keys.c.key_id)
        return self._database.read(lambda connection: list(connection.execute(query)))

    @staticmethod
    def _hash(key: str, pepper: bytes) -> bytes:
        return hmac.digest(pepper, key.encode(), "sha256")
