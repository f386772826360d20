"""The database: reached, migrated, and on PostgreSQL the version, rights, connections and durability."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from gateway_app.doctor.connecting import database_place, is_sqlite, reading, sqlite_path
from gateway_app.doctor.finding import Finding, fail, ok, warn
from tasks.migrating import read_schema
from tasks.settings import Settings

#: The oldest PostgreSQL that still gets corrections, and its number as the server gives it.
OLDEST, OLDEST_NUMBER = 14, 140_000
_WRITTEN = ("requests", "audit_events", "idempotency_keys", "api_keys")


def examine(settings: Settings) -> Iterator[Finding]:
    """Connect once, then check one thing after the other."""
    place = database_place(settings)
    if (missing := _missing_file(settings)) is not None:
        yield missing
        return
    answered = False
    try:
        with reading(settings) as connection:
            connection.exec_driver_sql("SELECT 1")
            answered = True
            yield ok("database", f"{place} answers")
            migrations = _migrations(connection)
            yield migrations
            if connection.dialect.name == "postgresql":
                for check in CHECKS:
                    yield check(connection, settings)
                if migrations.status != "fail":
                    yield _audit_rights(connection)
                    yield _rights(connection)
    except sa.exc.SQLAlchemyError as error:
        cause = type(getattr(error, "orig", None) or error).__name__
        if answered:
            yield fail(
                "database checks", f"one was refused: {cause}", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO …"
            )
            return
        yield fail("database", f"{place} cannot be asked: {cause}", "start it, or correct DATABASE_URL")


def _missing_file(settings: Settings) -> Finding | None:
    path = sqlite_path(settings)
    if path is None and is_sqlite(settings):
        return fail(
            "database", "it is in memory, where each process has its own", "DATABASE_URL=sqlite:///var/gateway.db"
        )
    if path is None or path.exists():
        return None
    return fail("database", f"{path} does not exist yet", "flask db upgrade")


def _migrations(connection: Connection) -> Finding:
    schema = read_schema(connection)
    if schema.pending:
        return fail("migrations", f"pending: {', '.join(schema.pending)}", "flask db upgrade")
    if schema.is_newer:
        says = f"the tables are of a newer release, at revision {schema.revision}: an upgrade is under way, or was taken back"
        return warn("migrations", says, "install the newer release on this host too")
    return ok("migrations", f"none is pending; the tables are at revision {schema.revision}")


def _version(connection: Connection, _settings: Settings) -> Finding:
    number, version = (_shown(connection, name) for name in ("server_version_num", "server_version"))
    if int(number) < OLDEST_NUMBER:
        return fail("database version", f"PostgreSQL {version} is too old", f"upgrade it to {OLDEST} or newer")
    return ok("database version", f"PostgreSQL {version}")


def _writes(connection: Connection, _settings: Settings) -> Finding:
    if connection.exec_driver_sql("SELECT pg_is_in_recovery()").scalar_one():
        return fail("database writes", "it is a standby, which only lets read", "DATABASE_URL of the primary")
    if _shown(connection, "default_transaction_read_only") == "on":
        return fail("database writes", "it only lets read", "ALTER ROLE … SET default_transaction_read_only = off")
    return ok("database writes", "it takes them")


def _durability(connection: Connection, _settings: Settings) -> Finding:
    off = [name for name in ("fsync", "synchronous_commit", "full_page_writes") if _shown(connection, name) == "off"]
    if "fsync" in off or "full_page_writes" in off:
        return fail("database durability", f"{' and '.join(off)} off: a host that fails loses data", f"{off[0]} = on")
    if off:
        says = "synchronous_commit is off: a host that fails loses requests that were accepted"
        return warn("database durability", says, "synchronous_commit = on")
    return ok("database durability", "a commit is on the disk when it is answered")


def _connections(connection: Connection, settings: Settings) -> Finding:
    most, kept = (int(_shown(connection, name)) for name in ("max_connections", "superuser_reserved_connections"))
    # Not from pg_stat_activity, which shows a role the sessions of others only in part.
    used = int(connection.exec_driver_sql("SELECT sum(numbackends) FROM pg_stat_database").scalar_one())
    each = settings.database.pool_size + 1
    says = f"{used} of {most - kept} in use, and each process takes up to {each}"
    if most - kept - used < each:
        return fail("database connections", says, "raise max_connections, or lower database.pool_size")
    return ok("database connections", says)


def _audit_rights(connection: Connection) -> Finding:
    """Return whether the role can alter the record: triggers stop an UPDATE, and an owner can drop triggers."""
    query = """
        SELECT current_user, rolsuper OR pg_has_role(relowner, 'USAGE') AS owns,
            has_table_privilege(c.oid, 'UPDATE') OR has_table_privilege(c.oid, 'DELETE') AS changes
        FROM pg_class c, pg_roles r WHERE c.oid = to_regclass('audit_events') AND r.rolname = current_user
    """
    role, owns, changes = connection.exec_driver_sql(query).one()
    if owns:
        says = f"the role {role} owns audit_events, so whoever has its password can drop the triggers that guard the record"
        return warn("audit rights", says, "migrate as the owner, serve as a role with GRANT SELECT, INSERT only")
    if changes:
        says = f"the role {role} has UPDATE or DELETE on audit_events, and needs neither"
        return warn("audit rights", says, f"REVOKE UPDATE, DELETE, TRUNCATE ON audit_events FROM {role}")
    return ok("audit rights", f"the role {role} can add to the record and not change it")


def _rights(connection: Connection) -> Finding:
    query = sa.text("SELECT has_table_privilege(:name, 'INSERT') AND has_table_privilege(:name, 'SELECT')")
    lacking = [name for name in _WRITTEN if not connection.execute(query, {"name": name}).scalar_one()]
    if lacking:
        says = f"the role may not read and add to {', '.join(lacking)}"
        return fail("database rights", says, f"GRANT SELECT, INSERT ON {', '.join(lacking)} TO …")
    return ok("database rights", "the role may read and add to what a gateway writes")


def _shown(connection: Connection, name: str) -> str:
    return str(connection.exec_driver_sql(f"SHOW {name}").scalar_one())


CHECKS: tuple[Callable[[Connection, Settings], Finding], ...] = (_version, _writes, _durability, _connections)
