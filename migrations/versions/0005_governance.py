"""Policies of organizations, who may change them, and the events that changes of policies and profiles leave.

SQLite cannot change the condition of a column or a table's CHECK, so `audit_events` is built again there: the rows keep
their content and their row numbers, and the indices, triggers and the view are made again. PostgreSQL alters the table
in place, with one look at each row to see that the new CHECK holds.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

TYPES = {"sqlite": {"time": "DATETIME"}, "postgresql": {"time": "TIMESTAMP WITH TIME ZONE"}}
TERMINAL = "('vetoed', 'completed', 'failed', 'cancelled', 'expired')"
CHANGES = "('policy_changed', 'profile_changed')"
KINDS = (
    "('received', 'vetoed', 'admitted', 'started', 'completed', 'failed', 'cancelled', 'expired',"
    " 'policy_changed', 'profile_changed')"
)

STATEMENTS = (
    """
    CREATE TABLE policies (
        organization VARCHAR(200) NOT NULL,
        version INTEGER NOT NULL,
        policy VARCHAR(64) NOT NULL,
        detection VARCHAR(16) NOT NULL,
        created_at {time} NOT NULL,
        created_by VARCHAR(40) NOT NULL,
        reason VARCHAR(500),
        PRIMARY KEY (organization, version),
        CONSTRAINT policies_detection CHECK (detection IN ('off', 'record', 'raise', 'refuse'))
    )
    """,
    # The keys that are there already, and those that a gateway of the release before makes, change nothing.
    """
    ALTER TABLE api_keys ADD COLUMN role VARCHAR(16) DEFAULT 'member' NOT NULL
        CONSTRAINT api_keys_role CHECK (role IN ('member', 'admin'))
    """,
)

EVENTS = f"""
CREATE TABLE audit_events_new (
    request_id VARCHAR(35) NOT NULL,
    kind VARCHAR(16) NOT NULL,
    attempt INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    occurred_at DATETIME NOT NULL,
    organization VARCHAR(200) NOT NULL,
    api_key_id VARCHAR(40) NOT NULL,
    agent_name VARCHAR(200),
    profile_version INTEGER,
    static_profile_hash VARCHAR(64),
    task_type VARCHAR(200),
    sensitivity VARCHAR(16),
    provider VARCHAR(200),
    policy VARCHAR(64),
    reason VARCHAR(500),
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
    details JSON,
    PRIMARY KEY (request_id, kind, attempt),
    CONSTRAINT audit_events_kind CHECK (kind IN {KINDS})
)
"""
COLUMNS = (
    "request_id, kind, attempt, epoch, occurred_at, organization, api_key_id, agent_name, profile_version, "
    "static_profile_hash, task_type, sensitivity, provider, policy, reason, code, project_id, artifact_id, task_id, "
    "worker, model, prompt_tokens, cached_tokens, output_tokens, queued_ms, prefill_ms, first_token_ms, total_ms, "
    "payload_sha256, details"
)

#: A request that was refused after it had been admitted has two decisions; the second one is shown.
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
    COALESCE(MAX(CASE WHEN kind = 'vetoed' THEN sensitivity END), MAX(sensitivity)) AS sensitivity,
    COALESCE(MAX(CASE WHEN kind = 'vetoed' THEN provider END), MAX(provider)) AS provider,
    COALESCE(MAX(CASE WHEN kind = 'vetoed' THEN policy END), MAX(policy)) AS policy,
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
WHERE kind NOT IN {CHANGES}
GROUP BY request_id
"""

REBUILT_ON_SQLITE = (
    EVENTS,
    f"INSERT INTO audit_events_new (rowid, {COLUMNS}) SELECT rowid, {COLUMNS} FROM audit_events ORDER BY rowid",
    # Its indices and triggers go with it.
    "DROP TABLE audit_events",
    "ALTER TABLE audit_events_new RENAME TO audit_events",
    "CREATE INDEX audit_events_by_time ON audit_events (organization, occurred_at)",
    f"CREATE UNIQUE INDEX audit_events_one_terminal ON audit_events (request_id) WHERE kind IN {TERMINAL}",
    *(
        f"CREATE TRIGGER audit_events_no_{verb} BEFORE {verb.upper()} ON audit_events "
        "BEGIN SELECT RAISE(ABORT, 'audit_events is insert-only'); END"
        for verb in ("update", "delete")
    ),
    # REPLACE deletes what conflicts with a new row, without firing the triggers above: see migration 0001.
    f"""
    CREATE TRIGGER audit_events_no_replace BEFORE INSERT ON audit_events
    WHEN EXISTS (SELECT 1 FROM audit_events WHERE request_id = NEW.request_id AND (
                     (kind = NEW.kind AND attempt = NEW.attempt)
                     OR (kind IN {TERMINAL} AND NEW.kind IN {TERMINAL})))
        OR EXISTS (SELECT 1 FROM audit_events WHERE rowid = NEW.rowid)
    BEGIN SELECT RAISE(ABORT, 'audit_events is insert-only'); END
    """,
)
SQLITE_GUARDS = (
    *(
        f"CREATE TRIGGER policies_no_{verb} BEFORE {verb.upper()} ON policies "
        "BEGIN SELECT RAISE(ABORT, 'policies is insert-only'); END"
        for verb in ("update", "delete")
    ),
    """
    CREATE TRIGGER policies_no_replace BEFORE INSERT ON policies
    WHEN EXISTS (SELECT 1 FROM policies WHERE organization = NEW.organization AND version = NEW.version)
        OR EXISTS (SELECT 1 FROM policies WHERE rowid = NEW.rowid)
    BEGIN SELECT RAISE(ABORT, 'policies is insert-only'); END
    """,
)

ALTERED_ON_POSTGRESQL = (
    f"""
    ALTER TABLE audit_events
        DROP CONSTRAINT audit_events_kind,
        ADD CONSTRAINT audit_events_kind CHECK (kind IN {KINDS}),
        ALTER COLUMN reason TYPE VARCHAR(500)
    """,
)
POSTGRES_GUARDS = (
    """
    CREATE FUNCTION refuse_policy_change() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'policies is insert-only' USING ERRCODE = 'insufficient_privilege'; END $$
    """,
    """
    CREATE TRIGGER policies_no_change BEFORE UPDATE OR DELETE ON policies
    FOR EACH ROW EXECUTE FUNCTION refuse_policy_change()
    """,
    """
    CREATE TRIGGER policies_no_truncate BEFORE TRUNCATE ON policies
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_policy_change()
    """,
)


def upgrade() -> None:
    """Add the table, the column and the kinds of events; every row stays as it is."""
    dialect = op.get_bind().dialect.name
    for statement in STATEMENTS:
        op.execute(statement.format(**TYPES[dialect]))
    op.execute("DROP VIEW audit_requests")
    changes = (REBUILT_ON_SQLITE, SQLITE_GUARDS) if dialect == "sqlite" else (ALTERED_ON_POSTGRESQL, POSTGRES_GUARDS)
    for statement in (*changes[0], *changes[1]):
        op.execute(statement)
    op.execute(VIEW)


def downgrade() -> None:
    """Refuse: who decided what must not be dropped by a migration."""
    raise NotImplementedError("policies are never removed by a migration")
