"""The whole API: what came in through which path, priority, deadline, cancelling, idempotency keys."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TYPES = {
    "sqlite": {"id": "VARCHAR(35)", "time": "DATETIME", "bytes": "BLOB"},
    "postgresql": {"id": 'VARCHAR(35) COLLATE "C"', "time": "TIMESTAMP WITH TIME ZONE", "bytes": "BYTEA"},
}

STATEMENTS = (
    # The defaults are for rows that are there already, and for gateways of the release before.
    "ALTER TABLE requests ADD COLUMN api VARCHAR(16) DEFAULT 'tasks' NOT NULL",
    "ALTER TABLE requests ADD COLUMN priority VARCHAR(8) DEFAULT 'normal' NOT NULL",
    "ALTER TABLE requests ADD COLUMN project_id VARCHAR(200)",
    "ALTER TABLE requests ADD COLUMN deadline {time}",
    "ALTER TABLE requests ADD COLUMN cancel_requested_at {time}",
    """
    CREATE TABLE idempotency_keys (
        organization VARCHAR(200) NOT NULL,
        key_hash {bytes} NOT NULL,
        body_hash {bytes} NOT NULL,
        request_id {id} NOT NULL,
        created_at {time} NOT NULL,
        PRIMARY KEY (organization, key_hash)
    )
    """,
    "CREATE INDEX idempotency_keys_by_time ON idempotency_keys (created_at)",
)


def upgrade() -> None:
    """Add columns and the table of keys."""
    for statement in STATEMENTS:
        op.execute(statement.format(**TYPES[op.get_bind().dialect.name]))


def downgrade() -> None:
    """Refuse: the requests that need these columns would be lost."""
    raise NotImplementedError("requests are never removed by a migration")
