"""Where the segments of a profile end, in tokens: workers and queue know by them which prefixes profiles share.

The columns may be NULL and have no default: both databases add them without touching a row, and the code of the release
before, which does not know them, runs on beside them. A gateway fills a profile's chain in when it meets the profile next.
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TYPES = {"sqlite": {"json": "JSON"}, "postgresql": {"json": "JSONB"}}

STATEMENTS = (
    "ALTER TABLE profiles ADD COLUMN chain {json}",
    # How many copies of an agent's active version are to be kept warm, and the hash of what that is.
    "ALTER TABLE agents ADD COLUMN pinned_copies INTEGER",
    "ALTER TABLE agents ADD COLUMN pinned_hash VARCHAR(64)",
)


def upgrade() -> None:
    """Add the columns."""
    for statement in STATEMENTS:
        op.execute(statement.format(**TYPES[op.get_bind().dialect.name]))


def downgrade() -> None:
    """Refuse, as every migration here does: what organizations wrote must not be dropped by one."""
    raise NotImplementedError("profiles are never removed by a migration")
