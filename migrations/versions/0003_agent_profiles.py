"""Agent profiles as versioned objects of an organization: the agents it made or changed, and their versions."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

#: Names are compared byte by byte on both databases.
TYPES = {
    "sqlite": {"name": "VARCHAR(200)", "time": "DATETIME", "bytes": "BLOB"},
    "postgresql": {"name": 'VARCHAR(200) COLLATE "C"', "time": "TIMESTAMP WITH TIME ZONE", "bytes": "BYTEA"},
}

TABLES = (
    """
    CREATE TABLE agents (
        organization VARCHAR(200) NOT NULL,
        agent_name {name} NOT NULL,
        active_version INTEGER,
        newest_version INTEGER NOT NULL,
        version_count INTEGER NOT NULL,
        created_at {time} NOT NULL,
        activated_at {time},
        activated_by VARCHAR(40),
        PRIMARY KEY (organization, agent_name)
    )
    """,
    """
    CREATE TABLE profile_versions (
        organization VARCHAR(200) NOT NULL,
        agent_name {name} NOT NULL,
        version INTEGER NOT NULL,
        data_key {bytes} NOT NULL,
        description {bytes} NOT NULL,
        segments {bytes} NOT NULL,
        created_at {time} NOT NULL,
        created_by VARCHAR(40) NOT NULL,
        prefix_base VARCHAR(64),
        static_profile_hash VARCHAR(64),
        static_token_count INTEGER,
        joinable BOOLEAN,
        PRIMARY KEY (organization, agent_name, version)
    )
    """,
)


def upgrade() -> None:
    """Create both tables."""
    for statement in TABLES:
        op.execute(statement.format(**TYPES[op.get_bind().dialect.name]))


def downgrade() -> None:
    """Refuse: what organizations wrote must not be dropped by a migration."""
    raise NotImplementedError("profiles are never removed by a migration")
