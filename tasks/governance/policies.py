"""Which policy an organization has: the newest of its versions, or the settings' as version 0.

A change is a new row and a `policy_changed` event in one transaction; nothing is ever altered. Two changes at once want
the same version number, which the table's key gives to one of them; the other looks again and is refused if it was made
to an older version. What is in force is remembered for a second a process, so that a request costs no query: a request
that slips through in that second is caught when it leaves the queue, where nothing is remembered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.audit.events import Subject, event, record
from tasks.db import Database, now
from tasks.errors import ConfigurationError, PolicyConflict, UnknownPolicy
from tasks.governance.decision import Detection
from tasks.governance.secure_gateway import resolve_policy
from tasks.ids import new_request_id
from tasks.schema_governance import policies
from tasks.settings import GovernanceGroup

#: For how long a process believes what it read, in seconds.
CACHE_S = 1.0
#: Organizations whose policies a process remembers.
CACHE_SIZE = 4096
#: How often a change is tried that others are made beside.
_TRIES = 20


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """One version of an organization's policy. Version 0 is the settings', which nobody made."""

    version: int
    policy: str
    detection: Detection
    created_at: datetime | None = None
    created_by: str | None = None
    reason: str | None = None


_COLUMNS = tuple(policies.c[field.name] for field in fields(PolicyVersion))


@dataclass(frozen=True, slots=True)
class Change:
    """What somebody wants to hold from now on. `policy` is a full name, `author` a key's id or `cli`.

    `expected` are the versions that it may replace; None allows any.
    """

    author: str
    policy: str
    detection: Detection | None = None
    reason: str | None = None
    expected: Collection[int] | None = None


def default_policy(settings: GovernanceGroup) -> PolicyVersion:
    """Return version 0. Raises ConfigurationError if the setting names no policy."""
    try:
        return PolicyVersion(0, resolve_policy(settings.policy), settings.detection)
    except UnknownPolicy as error:
        raise ConfigurationError(f"governance.policy: {error.detail}") from None


class Policies:
    """Reads and changes policies. `clock` is in seconds."""

    def __init__(self, database: Database, default: PolicyVersion, clock: Callable[[], float] = time.monotonic) -> None:
        self.default = default
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, PolicyVersion]] = {}

    def current(self, organization: str) -> PolicyVersion:
        """Return what was in force within the last second. Raises DatabaseUnavailable."""
        # Taken before reading: what is read may be older than the moment it arrives.
        at = self._clock()
        known = self._known.get(organization)
        if known is not None and at - known[0] < CACHE_S:
            return known[1]
        read = self.newest(organization)
        self._remember(organization, at, read)
        return read

    def newest(self, organization: str) -> PolicyVersion:
        """Return what is in force now. Raises DatabaseUnavailable."""
        return self._database.read(lambda connection: self._newest(connection, organization))

    def page(self, organization: str, before: int | None, limit: int) -> list[PolicyVersion]:
        """Return up to `limit` versions, the newest first, older than `before` if that is given; version 0 is none."""
        query = sa.select(*_COLUMNS).where(policies.c.organization == organization)
        if before is not None:
            query = query.where(policies.c.version < before)
        query = query.order_by(policies.c.version.desc()).limit(limit)
        return self._database.read(lambda connection: [PolicyVersion(*row) for row in connection.execute(query)])

    def change(self, organization: str, wanted: Change) -> PolicyVersion:
        """Put a policy into force and return it. The same policy as before makes no new version.

        Raises PolicyConflict if the version in force is none of the expected ones, DatabaseUnavailable.
        """
        for _ in range(_TRIES):
            at = self._clock()
            try:
                made = self._database.write(lambda connection: self._change(connection, organization, wanted))
            except sa.exc.IntegrityError:
                # Another change took the number in this moment; now it can be seen.
                continue
            self._remember(organization, at, made)
            return made
        raise PolicyConflict("the policy is being changed by others again and again")

    def _change(self, connection: Connection, organization: str, wanted: Change) -> PolicyVersion:
        old = self._newest(connection, organization)
        if wanted.expected is not None and old.version not in wanted.expected:
            raise PolicyConflict(f"the policy in force is version {old.version}", policy_version=old.version)
        detection = wanted.detection or old.detection
        # Version 0 follows the settings; to set the same is to say that it no longer shall.
        if old.version > 0 and (old.policy, old.detection) == (wanted.policy, detection):
            return old
        at = now()
        new = PolicyVersion(old.version + 1, wanted.policy, detection, at, wanted.author, wanted.reason)
        connection.execute(sa.insert(policies), {"organization": organization, **asdict(new)})
        changed = {
            "version": new.version,
            "previous_version": old.version,
            "from": {"policy": old.policy, "detection": old.detection},
            "to": {"policy": new.policy, "detection": new.detection},
        }
        subject = Subject(new_request_id(), organization, wanted.author)
        row = event(subject, "policy_changed", at=at, policy=new.policy, reason=wanted.reason, details=changed)
        record(connection, row)
        return new

    def _newest(self, connection: Connection, organization: str) -> PolicyVersion:
        query = sa.select(*_COLUMNS).where(policies.c.organization == organization)
        row = connection.execute(query.order_by(policies.c.version.desc()).limit(1)).one_or_none()
        return self.default if row is None else PolicyVersion(*row)

    def _remember(self, organization: str, at: float, version: PolicyVersion) -> None:
        with self._lock:
            known = self._known.get(organization)
            if known is not None and known[1].version > version.version:
                return
            if known is None and len(self._known) >= CACHE_SIZE:
                # The one that was remembered first goes; it costs one query to remember it again.
                del self._known[next(iter(self._known))]
            self._known[organization] = (at, version)
