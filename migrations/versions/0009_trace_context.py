"""The trace that a request belongs to is kept with it, so that it goes on wherever the request is published again.

The column may be NULL and has no default: both databases add it without touching a row, and the code of the release before,
which does not know it, runs on beside it.
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.execute("ALTER TABLE requests ADD COLUMN trace_context VARCHAR(568)")


def downgrade() -> None:
    """Refuse, as every migration here does: the record is never removed by one."""
    raise NotImplementedError("the record is never removed by a migration")
