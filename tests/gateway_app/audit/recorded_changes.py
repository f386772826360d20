"""Who asks in the record that the questions are tested on, and how policies and profiles change meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.profiles.history import record_change
from gateway_app.profiles.sealing import Why
from tasks.db import Database
from tasks.governance.policies import Change, Policies
from tasks.schema import api_keys

FIRST = datetime(2026, 11, 1, 8, tzinfo=UTC)
KEYS = {
    "key_00000000000000a1": ("acme", "build server"),
    "key_00000000000000a2": ("acme", "support desk"),
    "key_00000000000000b1": ("umbrella", "nightly"),
}


def add_keys(connection: Connection) -> None:
    """Store the keys."""
    rows = [
        {
            "key_id": key_id,
            "organization": organization,
            "name": name,
            "key_hash": key_id.encode().ljust(32),
            "created_at": FIRST,
        }
        for key_id, (organization, name) in KEYS.items()
    ]
    connection.execute(sa.insert(api_keys), rows)


def changes(database: Database, policies: Policies) -> Iterator[datetime]:
    """Change policies and profiles. Yields when the next changes are due, and makes them when asked to go on."""

    def activate(organization: str, key_id: str, agent: str, versions: tuple[int | None, int], reason: str) -> None:
        before, after = versions
        why = Why(key_id, author=None, reason=reason)
        database.write(
            lambda connection: record_change(
                connection, organization, agent, why, "activated", before=before, after=after
            )
        )

    first, *_, last = KEYS
    yield FIRST + timedelta(hours=5)
    policies.change("acme", Change(first, "enterprise_residency", "record", "Cloud only for what is public."))
    yield FIRST + timedelta(hours=20)
    activate("acme", first, "contract-validator", (1, 2), "Shorter role.")
    activate("umbrella", last, "migration-planner", (None, 1), "First version.")
    yield FIRST + timedelta(hours=28)
    policies.change("acme", Change(first, "compliance_local_only", "raise", "Audit of November."))
    policies.change("umbrella", Change("cli", "enterprise_residency", "refuse"))
    yield FIRST + timedelta(hours=50)
    activate("acme", first, "contract-validator", (2, 1), "Too short.")
