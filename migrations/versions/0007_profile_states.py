"""Profiles as managed objects: states, inheritance, canaries, and what the record tells of them.

A version that was tokenised before was active once, so it is not a draft; which of them came when is not known.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

#: Names are compared byte by byte on both databases.
TYPES = {
    "sqlite": {"name": "VARCHAR(200)", "time": "DATETIME", "bytes": "BLOB", "json": "JSON"},
    "postgresql": {
        "name": 'VARCHAR(200) COLLATE "C"',
        "time": "TIMESTAMP WITH TIME ZONE",
        "bytes": "BYTEA",
        "json": "JSONB",
    },
}

STATEMENTS = (
    # The defaults are for rows that are there already, and for gateways of the release before.
    "ALTER TABLE agents ADD COLUMN revision INTEGER DEFAULT 0 NOT NULL",
    "ALTER TABLE agents ADD COLUMN previous_version INTEGER",
    "ALTER TABLE agents ADD COLUMN retired_at {time}",
    "ALTER TABLE agents ADD COLUMN canary_version INTEGER",
    "ALTER TABLE agents ADD COLUMN canary_share FLOAT",
    "ALTER TABLE agents ADD COLUMN canary_since {time}",
    "ALTER TABLE profile_versions ADD COLUMN extends {name}",
    "ALTER TABLE profile_versions ADD COLUMN abstract BOOLEAN DEFAULT FALSE NOT NULL",
    "ALTER TABLE profile_versions ADD COLUMN author VARCHAR(200)",
    "ALTER TABLE profile_versions ADD COLUMN reason VARCHAR(500)",
    "ALTER TABLE profile_versions ADD COLUMN activated_at {time}",
    "ALTER TABLE profile_versions ADD COLUMN pins {json}",
    "ALTER TABLE profile_versions ADD COLUMN inherited {bytes}",
    "UPDATE profile_versions SET activated_at = created_at WHERE prefix_base IS NOT NULL",
    """
    UPDATE profile_versions SET activated_at = (
        SELECT activated_at FROM agents WHERE agents.organization = profile_versions.organization
        AND agents.agent_name = profile_versions.agent_name)
    WHERE EXISTS (
        SELECT 1 FROM agents WHERE agents.organization = profile_versions.organization
        AND agents.agent_name = profile_versions.agent_name AND agents.active_version = profile_versions.version)
    """,
    """
    CREATE INDEX audit_events_by_agent ON audit_events (organization, agent_name, occurred_at, profile_version)
    WHERE kind = 'admitted'
    """,
    """
    CREATE INDEX audit_events_profile_changes ON audit_events (organization, agent_name, request_id)
    WHERE kind = 'profile_changed'
    """,
)


def upgrade() -> None:
    """Add the columns and the indices; every row stays."""
    for statement in STATEMENTS:
        op.execute(statement.format(**TYPES[op.get_bind().dialect.name]))


def downgrade() -> None:
    """Refuse: what organizations wrote must not be dropped by a migration."""
    raise NotImplementedError("profiles are never removed by a migration")
