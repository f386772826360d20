"""First tables: keys, profiles, requests, the audit record and its view.

On PostgreSQL `requests` and `audit_events` are partitioned by month of their UUIDv7 id. Partitions for the coming
months are made here; a default partition takes whatever has none, so that no insert can fail for want of one.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

from alembic import op

from tasks.ids import lower_bound

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

MONTHS_AHEAD = 24
PARTITIONED = ("requests", "audit_events")
TERMINAL = "('vetoed', 'completed', 'failed', 'cancelled', 'expired')"

#: The types that differ: SQLite keeps instants as text, and PostgreSQL compares ids byte by byte.
TYPES = {
    "sqlite": {"id": "VARCHAR(35)", "time": "DATETIME", "bytes": "BLOB", "json": "JSON", "partition": ""},
    "postgresql": {
        "id": 'VARCHAR(35) COLLATE "C"',
        "time": "TIMESTAMP WITH TIME ZONE",
        "bytes": "BYTEA",
        "json": "JSONB",
        "partition": " PARTITION BY RANGE (request_id)",
    },
}

TABLES = (
    """
    CREATE TABLE api_keys (
        key_id VARCHAR(40) NOT NULL PRIMARY KEY,
        organization VARCHAR(200) NOT NULL,
        name VARCHAR(200) NOT NULL,
        key_hash {bytes} NOT NULL UNIQUE,
        created_at {time} NOT NULL,
        revoked_at {time}
    )
    """,
    """
    CREATE TABLE profiles (
        static_profile_hash VARCHAR(64) NOT NULL PRIMARY KEY,
        organization VARCHAR(200) NOT NULL,
        agent_name VARCHAR(200) NOT NULL,
        version INTEGER NOT NULL,
        model_fingerprint VARCHAR(64) NOT NULL,
        static_token_count INTEGER NOT NULL,
        static_token_ids {bytes} NOT NULL,
        data_key {bytes} NOT NULL,
        activated_at {time} NOT NULL
    )
    """,
    """
    CREATE TABLE requests (
        request_id {id} NOT NULL PRIMARY KEY,
        organization VARCHAR(200) NOT NULL,
        api_key_id VARCHAR(40) NOT NULL,
        agent_name VARCHAR(200) NOT NULL,
        static_profile_hash VARCHAR(64) NOT NULL,
        state VARCHAR(16) NOT NULL,
        epoch INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        worker VARCHAR(200),
        created_at {time} NOT NULL,
        published_at {time} NOT NULL,
        finished_at {time},
        error_code VARCHAR(64),
        data_key {bytes},
        payload {bytes},
        result {bytes},
        CONSTRAINT requests_state
            CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled', 'expired'))
    ){partition}
    """,
    "CREATE INDEX requests_by_organization ON requests (organization, request_id)",
    """
    CREATE TABLE audit_events (
        request_id {id} NOT NULL,
        kind VARCHAR(16) NOT NULL,
        attempt INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        occurred_at {time} NOT NULL,
        organization VARCHAR(200) NOT NULL,
        api_key_id VARCHAR(40) NOT NULL,
        agent_name VARCHAR(200),
        profile_version INTEGER,
        static_profile_hash VARCHAR(64),
        task_type VARCHAR(200),
        sensitivity VARCHAR(16),
        provider VARCHAR(200),
        policy VARCHAR(64),
        reason VARCHAR(200),
        code VARCHAR(64),
        project_id VARCHAR(200),
        artifact_id VARCHAR(200),
        task_id VARCHAR(200),
        worker VARCHAR(200),
        model VARCHAR(200),
        prompt_tokens INTEGER,
        cached_tokens INTEGER,
        output_tokens INTEGER,
        queued_ms FLOAT,
        prefill_ms FLOAT,
        first_token_ms FLOAT,
        total_ms FLOAT,
        payload_sha256 VARCHAR(64),
        details {json},
        PRIMARY KEY (request_id, kind, attempt),
        CONSTRAINT audit_events_kind CHECK (kind IN
            ('received', 'vetoed', 'admitted', 'started', 'completed', 'failed', 'cancelled', 'expired'))
    ){partition}
    """,
    "CREATE INDEX audit_events_by_time ON audit_events (organization, occurred_at)",
    f"CREATE UNIQUE INDEX audit_events_one_terminal ON audit_events (request_id) WHERE kind IN {TERMINAL}",
)

VIEW = f"""
CREATE VIEW audit_requests AS
SELECT
    request_id,
    MIN(organization) AS organization,
    MIN(api_key_id) AS api_key_id,
    MAX(agent_name) AS agent_name,
    MAX(profile_version) AS profile_version,
    MAX(static_profile_hash) AS static_profile_hash,
    MAX(task_type) AS task_type,
    MAX(sensitivity) AS sensitivity,
    MAX(provider) AS provider,
    MAX(policy) AS policy,
    MAX(project_id) AS project_id,
    MAX(artifact_id) AS artifact_id,
    MAX(task_id) AS task_id,
    MIN(CASE WHEN kind = 'received' THEN occurred_at END) AS received_at,
    MIN(CASE WHEN kind = 'admitted' THEN occurred_at END) AS admitted_at,
    MIN(CASE WHEN kind = 'started' THEN occurred_at END) AS started_at,
    MAX(CASE WHEN kind IN {TERMINAL} THEN occurred_at END) AS finished_at,
    MAX(CASE WHEN kind IN {TERMINAL} THEN kind END) AS outcome,
    MAX(CASE WHEN kind IN {TERMINAL} THEN code END) AS code,
    MAX(attempt) AS attempts,
    COALESCE(MAX(CASE WHEN kind IN {TERMINAL} THEN worker END), MAX(worker)) AS worker,
    MAX(model) AS model,
    MAX(prompt_tokens) AS prompt_tokens,
    MAX(cached_tokens) AS cached_tokens,
    MAX(output_tokens) AS output_tokens,
    MAX(queued_ms) AS queued_ms,
    MAX(prefill_ms) AS prefill_ms,
    MAX(first_token_ms) AS first_token_ms,
    MAX(total_ms) AS total_ms
FROM audit_events
GROUP BY request_id
"""

SQLITE_GUARDS = (
    *(
        f"CREATE TRIGGER audit_events_no_{verb} BEFORE {verb.upper()} ON audit_events "
        "BEGIN SELECT RAISE(ABORT, 'audit_events is insert-only'); END"
        for verb in ("update", "delete")
    ),
    # REPLACE deletes whatever conflicts with a new row, without firing the triggers above: its key, its row number
    # (NEW.rowid is -1 where none was given), or the one terminal event there may be.
    f"""
    CREATE TRIGGER audit_events_no_replace BEFORE INSERT ON audit_events
    WHEN EXISTS (SELECT 1 FROM audit_events WHERE request_id = NEW.request_id AND (
                     (kind = NEW.kind AND attempt = NEW.attempt)
                     OR (kind IN {TERMINAL} AND NEW.kind IN {TERMINAL})))
        OR EXISTS (SELECT 1 FROM audit_events WHERE rowid = NEW.rowid)
    BEGIN SELECT RAISE(ABORT, 'audit_events is insert-only'); END
    """,
)

POSTGRES_GUARDS = (
    """
    CREATE FUNCTION refuse_audit_change() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'audit_events is insert-only' USING ERRCODE = 'insufficient_privilege'; END $$
    """,
    """
    CREATE TRIGGER audit_events_no_change BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION refuse_audit_change()
    """,
    """
    CREATE TRIGGER audit_events_no_truncate BEFORE TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()
    """,
)


def upgrade() -> None:
    """Create everything; PostgreSQL also gets partitions and a guard on each of them."""
    bind = op.get_bind()
    postgres = bind.dialect.name == "postgresql"
    for statement in TABLES:
        op.execute(statement.format(**TYPES[bind.dialect.name]))
    if postgres:
        for table_name in PARTITIONED:
            _create_partitions(table_name)
    for statement in POSTGRES_GUARDS if postgres else SQLITE_GUARDS:
        op.execute(statement)
    if postgres:
        for partition in _partition_names("audit_events"):
            # A TRUNCATE trigger on the parent does not fire when a partition is truncated directly.
            op.execute(
                f"CREATE TRIGGER {partition}_no_truncate BEFORE TRUNCATE ON {partition} "
                "FOR EACH STATEMENT EXECUTE FUNCTION refuse_audit_change()"
            )
    op.execute(VIEW)


def downgrade() -> None:
    """Refuse: the record must not be dropped by a migration."""
    raise NotImplementedError("the audit record is never removed by a migration")


def _months() -> list[datetime]:
    first = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return [
        first.replace(year=first.year + (first.month - 1 + ahead) // 12, month=(first.month - 1 + ahead) % 12 + 1)
        for ahead in range(MONTHS_AHEAD + 1)
    ]


def _partition_names(table_name: str) -> list[str]:
    return [f"{table_name}_{month:%Y_%m}" for month in _months()[:-1]] + [f"{table_name}_rest"]


def _create_partitions(table_name: str) -> None:
    months = _months()
    for start, end in pairwise(months):
        op.execute(
            f"CREATE TABLE {table_name}_{start:%Y_%m} PARTITION OF {table_name} "
            f"FOR VALUES FROM ('{lower_bound(start)}') TO ('{lower_bound(end)}')"
        )
    op.execute(f"CREATE TABLE {table_name}_rest PARTITION OF {table_name} DEFAULT")
