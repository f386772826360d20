"""What reading the audit trail in order and answering questions of it needs.

Whoever follows the trail must meet each event once. PostgreSQL makes rows visible in another order than it numbers
them, so each row tells which transaction wrote it: below the oldest transaction that still runs, nothing can appear
any more. Rows that are there already are older than all of that, and say 0. SQLite has one writer at a time, whose
rows are numbered in the order of their commits, so there the column says nothing and its index stays empty.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

#: The constant first: a default that differs from row to row would have PostgreSQL write every row anew.
ORDER_STATEMENTS = {
    "sqlite": (
        "ALTER TABLE audit_events ADD COLUMN written_in BIGINT DEFAULT 0 NOT NULL",
        "CREATE INDEX audit_events_by_writing ON audit_events (written_in, request_id) WHERE written_in > 0",
    ),
    "postgresql": (
        "ALTER TABLE audit_events ADD COLUMN written_in BIGINT DEFAULT 0 NOT NULL",
        # A number of 64 bits that never wraps around; PostgreSQL has no cast from it to an integer but through text.
        "ALTER TABLE audit_events ALTER COLUMN written_in SET DEFAULT (pg_current_xact_id()::text::bigint)",
        "CREATE INDEX audit_events_by_writing ON audit_events (written_in, request_id)",
    ),
}

#: What docs/audit-queries.md asks of all time: the requests of a key, and whatever is rare. SQLite uses such an index
#: where a query says one of its alternatives, word by word; an IN would not do.
INDEX_STATEMENTS = (
    "CREATE INDEX audit_events_by_key ON audit_events (api_key_id, request_id) WHERE kind = 'received'",
    """
    CREATE INDEX audit_events_exceptions ON audit_events (kind, organization, occurred_at)
    WHERE kind = 'vetoed' OR kind = 'failed' OR kind = 'policy_changed' OR kind = 'profile_changed'
    """,
)


def upgrade() -> None:
    """Add the column that tells the order, and the indices."""
    for statement in (*ORDER_STATEMENTS[op.get_bind().dialect.name], *INDEX_STATEMENTS):
        op.execute(statement)


def downgrade() -> None:
    """Refuse."""
    raise NotImplementedError("the record is never removed by a migration")
