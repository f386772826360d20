"""Migrations that no release has."""

from __future__ import annotations

import shutil
from pathlib import Path

from tasks.migrating import MIGRATIONS


def with_migration(folder: Path, statement: str) -> Path:
    """Return a copy of the migrations with one more, which runs `statement`."""
    scripts = Path(shutil.copytree(MIGRATIONS, folder / "migrations"))
    newest = max(path.name[:4] for path in (scripts / "versions").glob("[0-9]*.py"))
    content = f"from alembic import op\nrevision, down_revision = '9999', {newest!r}\n"
    body = f"def upgrade() -> None:\n    op.execute({statement!r})\n"
    (scripts / "versions" / "9999_next.py").write_text(content + body, "utf-8")
    return scripts
