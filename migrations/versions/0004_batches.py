"""Files and batches: sealed chunks, and a row for each line of a batch."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

#: Ids are compared byte by byte on both databases.
TYPES = {
    "sqlite": {"id": "VARCHAR(40)", "request_id": "VARCHAR(35)", "time": "DATETIME", "bytes": "BLOB", "json": "JSON"},
    "postgresql": {
        "id": 'VARCHAR(40) COLLATE "C"',
        "request_id": 'VARCHAR(35) COLLATE "C"',
        "time": "TIMESTAMP WITH TIME ZONE",
        "bytes": "BYTEA",
        "json": "JSONB",
    },
}

STATEMENTS = (
    """
    CREATE TABLE files (
        file_id {id} NOT NULL PRIMARY KEY,
        organization VARCHAR(200) NOT NULL,
        api_key_id VARCHAR(40) NOT NULL,
        purpose VARCHAR(16) NOT NULL,
        status VARCHAR(16) NOT NULL,
        bytes BIGINT NOT NULL,
        created_at {time} NOT NULL,
        expires_at {time},
        data_key {bytes},
        filename {bytes} NOT NULL,
        CONSTRAINT files_status CHECK (status IN ('uploading', 'processed', 'deleted'))
    )
    """,
    "CREATE INDEX files_by_organization ON files (organization, file_id)",
    """
    CREATE TABLE file_chunks (
        file_id {id} NOT NULL,
        number INTEGER NOT NULL,
        sealed {bytes} NOT NULL,
        PRIMARY KEY (file_id, number)
    )
    """,
    """
    CREATE TABLE batches (
        batch_id {id} NOT NULL PRIMARY KEY,
        organization VARCHAR(200) NOT NULL,
        api_key_id VARCHAR(40) NOT NULL,
        endpoint VARCHAR(40) NOT NULL,
        input_file_id {id} NOT NULL,
        status VARCHAR(16) NOT NULL,
        created_at {time} NOT NULL,
        expires_at {time} NOT NULL,
        in_progress_at {time},
        finalizing_at {time},
        cancelling_at {time},
        ended_at {time},
        total INTEGER NOT NULL,
        completed INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        errors {json},
        usage {json},
        output_file_id {id},
        error_file_id {id},
        output_seconds INTEGER,
        data_key {bytes} NOT NULL,
        client_metadata {bytes},
        claim INTEGER NOT NULL,
        claimed_by VARCHAR(200),
        claimed_until {time},
        CONSTRAINT batches_status CHECK (status IN
            ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelling', 'cancelled'))
    )
    """,
    "CREATE INDEX batches_by_organization ON batches (organization, batch_id)",
    "CREATE INDEX batches_by_status ON batches (status)",
    """
    CREATE TABLE batch_items (
        batch_id {id} NOT NULL,
        line_number INTEGER NOT NULL,
        custom_id VARCHAR(512) NOT NULL,
        byte_offset BIGINT NOT NULL,
        byte_length INTEGER NOT NULL,
        state VARCHAR(16) NOT NULL,
        request_id {request_id},
        error_code VARCHAR(64),
        error {bytes},
        PRIMARY KEY (batch_id, line_number),
        CONSTRAINT batch_items_state
            CHECK (state IN ('pending', 'taken', 'completed', 'failed', 'cancelled', 'expired'))
    )
    """,
    "CREATE UNIQUE INDEX batch_items_by_custom_id ON batch_items (batch_id, custom_id)",
)


def upgrade() -> None:
    """Create the tables."""
    bind = op.get_bind()
    for statement in STATEMENTS:
        op.execute(statement.format(**TYPES[bind.dialect.name]))
    if bind.dialect.name == "postgresql":
        # Ciphertext does not compress; trying costs CPU on every chunk.
        op.execute("ALTER TABLE file_chunks ALTER COLUMN sealed SET STORAGE EXTERNAL")


def downgrade() -> None:
    """Refuse: what clients uploaded must not be dropped by a migration."""
    raise NotImplementedError("files and batches are never removed by a migration")
