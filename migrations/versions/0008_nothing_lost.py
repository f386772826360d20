"""What losing nothing needs: the message is kept until the end, attempts may be given back, and a request may be dead.

SQLite cannot change a CHECK or a primary key, so `requests` and `audit_events` are built again there: the rows keep their
content and their row numbers, and the indices, triggers and the view are made again. PostgreSQL alters the partitioned
tables in place, with one look at each row to see that the new constraints hold, and builds three indices anew.

Requests that are open now have no message: one that Redis loses cannot be made again, and is then dead.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

STATES = "('queued', 'running', 'completed', 'failed', 'cancelled', 'expired', 'dead')"
TERMINAL = "('vetoed', 'completed', 'failed', 'cancelled', 'expired', 'dead')"
CHANGES = "('policy_changed', 'profile_changed')"
KINDS = (
    "('received', 'vetoed', 'admitted', 'started', 'requeued', 'completed', 'failed', 'cancelled', 'expired', 'dead',"
    " 'policy_changed', 'profile_changed')"
)
#: SQLite uses the index where a query says one of its alternatives, word by word.
EXCEPTIONAL = " OR ".join(
    f"kind = '{kind}'" for kind in ("vetoed", "failed", "dead", "policy_changed", "profile_changed")
)

REQUESTS = f"""
CREATE TABLE requests_new (
    request_id VARCHAR(35) NOT NULL PRIMARY KEY,
    organization VARCHAR(200) NOT NULL,
    api_key_id VARCHAR(40) NOT NULL,
    agent_name VARCHAR(200) NOT NULL,
    static_profile_hash VARCHAR(64) NOT NULL,
    state VARCHAR(16) NOT NULL,
    epoch INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    worker VARCHAR(200),
    created_at DATETIME NOT NULL,
    published_at DATETIME NOT NULL,
    finished_at DATETIME,
    error_code VARCHAR(64),
    data_key BLOB,
    payload BLOB,
    result BLOB,
    api VARCHAR(16) DEFAULT 'tasks' NOT NULL,
    priority VARCHAR(8) DEFAULT 'normal' NOT NULL,
    project_id VARCHAR(200),
    deadline DATETIME,
    cancel_requested_at DATETIME,
    message BLOB,
    prompt_tokens INTEGER,
    excused INTEGER DEFAULT 0 NOT NULL,
    not_before DATETIME,
    CONSTRAINT requests_state CHECK (state IN {STATES})
)
"""
REQUEST_COLUMNS = (
    "request_id, organization, api_key_id, agent_name, static_profile_hash, state, epoch, attempt, worker, created_at, "
    "published_at, finished_at, error_code, data_key, payload, result, api, priority, project_id, deadline, "
    "cancel_requested_at"
)
#: What has not ended, and of it what has to be answered by some time.
REQUEST_INDICES = (
    "CREATE INDEX requests_open ON requests (request_id) WHERE finished_at IS NULL",
    "CREATE INDEX requests_due ON requests (deadline) WHERE finished_at IS NULL AND deadline IS NOT NULL",
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
    written_in BIGINT DEFAULT 0 NOT NULL,
    PRIMARY KEY (request_id, kind, attempt, epoch),
    CONSTRAINT audit_events_kind CHECK (kind IN {KINDS})
)
"""
EVENT_COLUMNS = (
    "request_id, kind, attempt, epoch, occurred_at, organization, api_key_id, agent_name, profile_version, "
    "static_profile_hash, task_type, sensitivity, provider, policy, reason, code, project_id, artifact_id, task_id, "
    "worker, model, prompt_tokens, cached_tokens, output_tokens, queued_ms, prefill_ms, first_token_ms, total_ms, "
    "payload_sha256, details, written_in"
)
EXCEPTIONS = (
    f"CREATE INDEX audit_events_exceptions ON audit_events (kind, organization, occurred_at) WHERE {EXCEPTIONAL}"
)
ONE_TERMINAL = f"CREATE UNIQUE INDEX audit_events_one_terminal ON audit_events (request_id) WHERE kind IN {TERMINAL}"

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

ON_SQLITE = (
    REQUESTS,
    f"INSERT INTO requests_new (rowid, {REQUEST_COLUMNS}) SELECT rowid, {REQUEST_COLUMNS} FROM requests ORDER BY rowid",
    "DROP TABLE requests",
    "ALTER TABLE requests_new RENAME TO requests",
    "CREATE INDEX requests_by_organization ON requests (organization, request_id)",
    *REQUEST_INDICES,
    EVENTS,
    f"INSERT INTO audit_events_new (rowid, {EVENT_COLUMNS}) SELECT rowid, {EVENT_COLUMNS} FROM audit_events ORDER BY rowid",
    # Its indices and triggers go with it.
    "DROP TABLE audit_events",
    "ALTER TABLE audit_events_new RENAME TO audit_events",
    "CREATE INDEX audit_events_by_time ON audit_events (organization, occurred_at)",
    "CREATE INDEX audit_events_by_writing ON audit_events (written_in, request_id) WHERE written_in > 0",
    "CREATE INDEX audit_events_by_key ON audit_events (api_key_id, request_id) WHERE kind = 'received'",
    EXCEPTIONS,
    ONE_TERMINAL,
    """
    CREATE INDEX audit_events_by_agent ON audit_events (organization, agent_name, occurred_at, profile_version)
    WHERE kind = 'admitted'
    """,
    """
    CREATE INDEX audit_events_profile_changes ON audit_events (organization, agent_name, request_id)
    WHERE kind = 'profile_changed'
    """,
    *(
        f"CREATE TRIGGER audit_events_no_{verb} BEFORE {verb.upper()} ON audit_events "
        "BEGIN SELECT RAISE(ABORT, 'audit_events is insert-only'); END"
        for verb in ("update", "delete")
    ),
    # REPLACE deletes what conflicts with a new row, without firing the triggers above: see migration 0001.
    f"""
    CREATE TRIGGER audit_events_no_replace BEFORE INSERT ON audit_events
    WHEN EXISTS (SELECT 1 FROM audit_events WHERE request_id = NEW.request_id AND (
                     (kind = NEW.kind AND attempt = NEW.attempt AND epoch = NEW.epoch)
                     OR (kind IN {TERMINAL} AND NEW.kind IN {TERMINAL})))
        OR EXISTS (SELECT 1 FROM audit_events WHERE rowid = NEW.rowid)
    BEGIN SELECT RAISE(ABORT, 'audit_events is insert-only'); END
    """,
)

ON_POSTGRESQL = (
    f"""
    ALTER TABLE requests
        ADD COLUMN message BYTEA,
        ADD COLUMN prompt_tokens INTEGER,
        ADD COLUMN excused INTEGER DEFAULT 0 NOT NULL,
        ADD COLUMN not_before TIMESTAMP WITH TIME ZONE,
        DROP CONSTRAINT requests_state,
        ADD CONSTRAINT requests_state CHECK (state IN {STATES})
    """,
    *REQUEST_INDICES,
    f"""
    ALTER TABLE audit_events
        DROP CONSTRAINT audit_events_kind,
        ADD CONSTRAINT audit_events_kind CHECK (kind IN {KINDS}),
        DROP CONSTRAINT audit_events_pkey,
        ADD PRIMARY KEY (request_id, kind, attempt, epoch)
    """,
    "DROP INDEX audit_events_exceptions",
    EXCEPTIONS,
    "DROP INDEX audit_events_one_terminal",
    ONE_TERMINAL,
)


def upgrade() -> None:
    """Change both tables; every row stays as it is."""
    op.execute("DROP VIEW audit_requests")
    for statement in ON_SQLITE if op.get_bind().dialect.name == "sqlite" else ON_POSTGRESQL:
        op.execute(statement)
    op.execute(VIEW)


def downgrade() -> None:
    """Refuse: how requests ended must not be dropped by a migration."""
    raise NotImplementedError("the record is never removed by a migration")
