"""The tables of agents and their versions; they share `tasks.schema`'s metadata.

A version's own text never changes, and neither does what it inherits once that is pinned. Its state follows from its
agent's row: the active one, the one on trial beside it, one that was active (`activated_at`), or a draft.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Float, Integer, LargeBinary, String, Table, false, text

from tasks.schema import metadata
from tasks.schema_types import Document, UtcDateTime

#: Names in the same order everywhere, byte by byte, whatever the locale: pages of a list depend on it.
_BYTEWISE_NAME = String(200).with_variant(String(200, collation="C"), "postgresql")

#: What an organization made of an agent. Without an active version of its own, the file that was shipped is active,
#: unless `retired_at` is set. In `previous_version` and `canary_version`, 0 stands for that file. `revision` counts
#: changes. A canary gets its share, from 0 to 1, of the requests. Of a pinned agent's active version, whose static part has
#: the hash `pinned_hash`, `pinned_copies` are kept warm.
agents = Table(
    "agents",
    metadata,
    Column("organization", String(200), primary_key=True),
    Column("agent_name", _BYTEWISE_NAME, primary_key=True),
    Column("active_version", Integer),
    Column("newest_version", Integer, nullable=False),
    Column("version_count", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("activated_at", UtcDateTime),
    Column("activated_by", String(40)),
    Column("revision", Integer, nullable=False, server_default=text("0")),
    Column("previous_version", Integer),
    Column("retired_at", UtcDateTime),
    Column("canary_version", Integer),
    Column("canary_share", Float),
    Column("canary_since", UtcDateTime),
    Column("pinned_copies", Integer),
    Column("pinned_hash", String(64)),
)

#: An organization's own versions. Text is sealed; what tokenising gave holds while `prefix_base` is still the same.
#: `pins` are the versions of the bases that `inherited`, their sealed text, was taken from, the nearest first.
profile_versions = Table(
    "profile_versions",
    metadata,
    Column("organization", String(200), primary_key=True),
    Column("agent_name", _BYTEWISE_NAME, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("data_key", LargeBinary, nullable=False),
    Column("description", LargeBinary, nullable=False),
    Column("segments", LargeBinary, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("created_by", String(40), nullable=False),
    Column("prefix_base", String(64)),
    Column("static_profile_hash", String(64)),
    Column("static_token_count", Integer),
    Column("joinable", Boolean),
    Column("extends", _BYTEWISE_NAME),
    Column("abstract", Boolean, nullable=False, server_default=false()),
    Column("author", String(200)),
    Column("reason", String(500)),
    Column("activated_at", UtcDateTime),
    Column("pins", Document),
    Column("inherited", LargeBinary),
)
