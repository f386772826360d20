"""Alembic's entry point: runs the migrations against the URL that `tasks.migrating` hands over."""

from __future__ import annotations

from alembic import context
from sqlalchemy.engine import Engine

from tasks.db_engine import create_engine
from tasks.migrating import LOCK_TIMEOUT_S, UpgradeUnderWay
from tasks.schema import metadata
from tasks.settings import DatabaseGroup

#: PostgreSQL's advisory lock that the one upgrade holds.
LOCK = 7355608


def run(engine: Engine) -> None:
    """Run what is pending, alone: two gateways that start at once must not migrate at once."""
    # SQLite takes its write lock at once: of two starts that both read first, neither could write.
    with engine.execution_options(immediate=True).connect() as connection:
        context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
        with context.begin_transaction():
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S:g}s'")
                if not connection.exec_driver_sql(f"SELECT pg_try_advisory_xact_lock({LOCK})").scalar_one():
                    raise UpgradeUnderWay
            context.run_migrations()


engine = create_engine(DatabaseGroup(url=context.config.attributes["url"], timeout_s=60))
try:
    run(engine)
finally:
    engine.dispose()
