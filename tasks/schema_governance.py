"""The table of policies; it shares `tasks.schema`'s metadata.

One row is one version of an organization's policy, and the newest one is in force. Rows are only ever inserted, which
triggers see to, so the table is its own history.
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, Integer, String, Table

from tasks.schema import metadata
from tasks.schema_types import UtcDateTime, quoted

#: What is done about private or sensitive data that is found in a request, from the least to the most.
DETECTION_MODES = ("off", "record", "raise", "refuse")

policies = Table(
    "policies",
    metadata,
    Column("organization", String(200), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("policy", String(64), nullable=False),
    Column("detection", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_by", String(40), nullable=False),
    Column("reason", String(500)),
    CheckConstraint(f"detection IN ({quoted(DETECTION_MODES)})", name="policies_detection"),
)
