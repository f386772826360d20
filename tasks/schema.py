"""The tables, as SQLAlchemy Core sees them. `migrations/` creates them; a test keeps the two equal.

`audit_events` is the record: it is only ever inserted into, and triggers refuse everything else. `requests` is the
state that the gateway works with, derived from the same transactions. Both are range-partitioned by request id on
PostgreSQL, which is why the id leads every key.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    FetchedValue,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    text,
)

from tasks.schema_types import Document, RequestId, UtcDateTime, quoted
from tasks.tracing.context import CONTEXT_MAX

metadata = MetaData()

#: What may be recorded of a request, in the order it can happen.
REQUEST_KINDS = (
    *("received", "vetoed", "admitted", "started", "requeued"),
    *("completed", "failed", "cancelled", "expired", "dead"),
)
#: What may be recorded of the rules and prompts themselves, under an id of the change's own.
CHANGE_KINDS = ("policy_changed", "profile_changed")
KINDS = (*REQUEST_KINDS, *CHANGE_KINDS)
#: After one of these nothing more is recorded of the request.
TERMINAL_KINDS = ("vetoed", "completed", "failed", "cancelled", "expired", "dead")
#: What an API key may do: change what holds for its organization, or only ask.
ROLES = ("member", "admin")
STATES = ("queued", "running", "completed", "failed", "cancelled", "expired", "dead")
TERMINAL_STATES = ("completed", "failed", "cancelled", "expired", "dead")


def _id() -> Column[Any]:
    return Column("request_id", RequestId, primary_key=True)


api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(40), primary_key=True),
    Column("organization", String(200), nullable=False),
    Column("name", String(200), nullable=False),
    Column("key_hash", LargeBinary(32), nullable=False, unique=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
    Column("role", String(16), nullable=False, server_default="member"),
    CheckConstraint(f"role IN ({quoted(ROLES)})", name="api_keys_role"),
)

profiles = Table(
    "profiles",
    metadata,
    Column("static_profile_hash", String(64), primary_key=True),
    Column("organization", String(200), nullable=False),
    Column("agent_name", String(200), nullable=False),
    Column("version", Integer, nullable=False),
    Column("model_fingerprint", String(64), nullable=False),
    Column("static_token_count", Integer, nullable=False),
    Column("static_token_ids", LargeBinary, nullable=False),
    Column("data_key", LargeBinary, nullable=False),
    Column("activated_at", UtcDateTime, nullable=False),
    # The segments inside it that others may share: [[hash, tokens from the start, kind], ...]; release 0.1.0 stored none.
    Column("chain", Document),
)

requests = Table(
    "requests",
    metadata,
    _id(),
    Column("organization", String(200), nullable=False),
    Column("api_key_id", String(40), nullable=False),
    Column("agent_name", String(200), nullable=False),
    Column("static_profile_hash", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("worker", String(200)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("published_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Column("error_code", String(64)),
    Column("data_key", LargeBinary),
    Column("payload", LargeBinary),
    Column("result", LargeBinary),
    Column("api", String(16), nullable=False),
    Column("priority", String(8), nullable=False),
    Column("project_id", String(200)),
    Column("deadline", UtcDateTime),
    Column("cancel_requested_at", UtcDateTime),
    # The sealed part of the queue message, so that a message that Redis lost can be made again; NULL once it has ended.
    Column("message", LargeBinary),
    Column("prompt_tokens", Integer),
    # How many of its attempts ended by no fault of the request.
    Column("excused", Integer, nullable=False, server_default="0"),
    # Until when the next attempt waits, after one that failed.
    Column("not_before", UtcDateTime),
    # The trace it belongs to, as `tasks.tracing.context` writes it; NULL where none is recorded.
    Column("trace_context", String(CONTEXT_MAX)),
    CheckConstraint(f"state IN ({quoted(STATES)})", name="requests_state"),
    Index("requests_by_organization", "organization", "request_id"),
    # What has not ended: the housekeeper walks through it, however many requests have.
    Index(
        "requests_open",
        "request_id",
        sqlite_where=text("finished_at IS NULL"),
        postgresql_where=text("finished_at IS NULL"),
    ),
    # What has to be answered by some time, the most urgent first.
    Index(
        "requests_due",
        "deadline",
        sqlite_where=text("finished_at IS NULL AND deadline IS NOT NULL"),
        postgresql_where=text("finished_at IS NULL AND deadline IS NOT NULL"),
    ),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("organization", String(200), primary_key=True),
    Column("key_hash", LargeBinary(32), primary_key=True),
    Column("body_hash", LargeBinary(32), nullable=False),
    Column("request_id", RequestId, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Index("idempotency_keys_by_time", "created_at"),
)

_EXCEPTIONAL = " OR ".join(f"kind = '{kind}'" for kind in ("vetoed", "failed", "dead", *CHANGE_KINDS))

audit_events = Table(
    "audit_events",
    metadata,
    _id(),
    Column("kind", String(16), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("occurred_at", UtcDateTime, nullable=False),
    Column("organization", String(200), nullable=False),
    Column("api_key_id", String(40), nullable=False),
    Column("agent_name", String(200)),
    Column("profile_version", Integer),
    Column("static_profile_hash", String(64)),
    Column("task_type", String(200)),
    Column("sensitivity", String(16)),
    Column("provider", String(200)),
    Column("policy", String(64)),
    Column("reason", String(500)),
    Column("code", String(64)),
    Column("project_id", String(200)),
    Column("artifact_id", String(200)),
    Column("task_id", String(200)),
    Column("worker", String(200)),
    Column("model", String(200)),
    Column("prompt_tokens", Integer),
    Column("cached_tokens", Integer),
    Column("output_tokens", Integer),
    Column("queued_ms", Float),
    Column("prefill_ms", Float),
    Column("first_token_ms", Float),
    Column("total_ms", Float),
    Column("payload_sha256", String(64)),
    Column("details", Document),
    # On PostgreSQL the transaction that wrote the row, by default; whoever follows the trail reads in its order.
    Column("written_in", BigInteger, nullable=False, server_default=FetchedValue()),
    CheckConstraint(f"kind IN ({quoted(KINDS)})", name="audit_events_kind"),
    Index("audit_events_by_time", "organization", "occurred_at"),
    Index(
        "audit_events_by_key",
        "api_key_id",
        "request_id",
        sqlite_where=text("kind = 'received'"),
        postgresql_where=text("kind = 'received'"),
    ),
    # Refusals, failures and changes: few rows, and asked about over long times.
    Index(
        "audit_events_exceptions",
        "kind",
        "organization",
        "occurred_at",
        sqlite_where=text(_EXCEPTIONAL),
        postgresql_where=text(_EXCEPTIONAL),
    ),
    # SQLite's row numbers are that order; there the column is always 0, and the index stays empty.
    Index("audit_events_by_writing", "written_in", "request_id", sqlite_where=text("written_in > 0")),
    Index(
        "audit_events_one_terminal",
        "request_id",
        unique=True,
        sqlite_where=text(f"kind IN ({quoted(TERMINAL_KINDS)})"),
        postgresql_where=text(f"kind IN ({quoted(TERMINAL_KINDS)})"),
    ),
    # What became of the requests that one version of an agent got.
    Index(
        "audit_events_by_agent",
        "organization",
        "agent_name",
        "occurred_at",
        "profile_version",
        sqlite_where=text("kind = 'admitted'"),
        postgresql_where=text("kind = 'admitted'"),
    ),
    # What was done to an agent, in order.
    Index(
        "audit_events_profile_changes",
        "organization",
        "agent_name",
        "request_id",
        sqlite_where=text("kind = 'profile_changed'"),
        postgresql_where=text("kind = 'profile_changed'"),
    ),
)
