"""The questions of docs/audit-queries.md on a large record: how long each takes, and what its indices cost.

A record of 20 organizations is made and loaded in bulk into SQLite and into PostgreSQL, with the product's own tables,
indices and partitions. It begins on the first of this month, so that it lies in the partitions that it would lie in
after so long a time. Each question is asked for one day, those about rare events for all days, the one about a key of
all time: always of the busiest organization and worker. A figure is the median of five runs, rows fetched, after one
that warms the caches. PostgreSQL gets the statistics that its autovacuum would have taken; SQLite has none, like a
gateway's.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from bench.audit_record import COLUMNS, KEYS, ORGANIZATIONS, WORKERS, Record
from bench.report import arguments, finish
from tasks.ids import lower_bound
from tasks.migrating import upgrade
from tests.gateway_app.audit.questions import period, questions
from tests.services.postgres_server import PostgresServer

#: Questions about what is rare. They are asked for the whole record.
RARE = ("refusals", "vetoes-by-project", "policy-changes", "profile-changes", "errors-by-hour", "dead")
#: What the questions need beyond what the gateway itself does.
OWN_INDICES = ("audit_events_by_key", "audit_events_exceptions")
RUNS = 5
TARGET_MS = 200.0
#: Events in each of several runs, without the indices and with them by turns; the quickest of each counts.
INSERTED = 40_000
INSERT_RUNS = 8
LOADED_AT_ONCE = 50_000
#: SQLite's page cache while loading; questions are asked over a new connection, with SQLite's default.
CACHE_KIB = 256 * 1024


class LargePostgres(PostgresServer):
    """PostgreSQL with memory for more than a test."""

    def command(self) -> list[str]:
        """Return the command that runs it."""
        return [*super().command(), "-c", "shared_buffers=512MB", "-c", "max_wal_size=8GB", "-c", "work_mem=16MB"]


def main() -> None:
    """Run it."""
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--days", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--without-indices", action="store_true", help="see what fails without those of the questions")
    parser.add_argument("--database", choices=("sqlite", "postgresql"), help="only this one; default: both")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for kind in [options.database] if options.database else ["sqlite", "postgresql"]:
        with database(kind) as url, database(kind) as empty:
            figures |= {f"{kind} {name}": value for name, value in measure(url, empty, options).items()}
    finish("audit_queries", options, figures, {name: ("<=", TARGET_MS) for name in figures if name.endswith(" ms")})


@contextlib.contextmanager
def database(kind: str) -> Iterator[str]:
    """Make an empty database with the product's tables, and remove it at the end."""
    with contextlib.ExitStack() as stack:
        if kind == "sqlite":
            url = f"sqlite:///{Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'gateway.db'}"
        else:
            server = LargePostgres()
            stack.callback(server.close)
            server.start()
            url = server.url(server.create_database())
        upgrade(url)
        yield url


def measure(url: str, empty: str, options: Any) -> dict[str, float]:
    """Load the record and ask all questions of it; then see what the indices cost."""
    record = Record(options.requests, options.days, options.seed)
    engine = sa.create_engine(url)
    figures: dict[str, float] = {}
    with engine.connect() as connection:
        for name in OWN_INDICES if options.without_indices else ():
            connection.exec_driver_sql(f"DROP INDEX {name}")
        connection.commit()
        began = time.perf_counter()
        load(connection, record.rows())
        figures["load s"] = time.perf_counter() - began
        refresh(connection)
        connection.detach()
    with engine.connect() as connection:
        for name, question in questions().items():
            parameters = asked(record, connection, rare=name in RARE)
            figures[f"{name} ms"] = median_ms(lambda: question.ask(connection, parameters))  # noqa: B023  called now
        # Whoever asks about a key that was hardly used looks for what is not there: nothing ends the search early.
        unused = asked(record, connection, rare=False) | {"key_id": "key_unused"}
        figures["key-activity, unused key ms"] = median_ms(lambda: questions()["key-activity"].ask(connection, unused))
        figures |= {f"{name} MB": size / 1e6 for name, size in sizes(connection).items()}
    engine.dispose()
    return figures | inserting(empty, options)


def asked(record: Record, connection: Connection, *, rare: bool) -> dict[str, Any]:
    """Return values for all parameters: a day in the middle of the record, or all of it for what is rare."""
    middle = record.start + timedelta(days=record.days // 2)
    since, until = (record.start, record.end) if rare else (middle, middle + timedelta(days=1))
    some = sa.text("SELECT MIN(request_id) FROM audit_events WHERE request_id >= :first AND kind = 'completed'")
    return {
        **period(since, until),
        "organization": ORGANIZATIONS[0],
        "key_id": KEYS[0],
        "worker": WORKERS[0],
        "policy_version": record.policy_version(middle),
        "limit": 100,
        "request_id": connection.execute(some, {"first": lower_bound(middle)}).scalar_one(),
    }


def load(connection: Connection, rows: Iterable[tuple[Any, ...]]) -> None:
    """Add rows in bulk and commit them."""
    raw: Any = connection.connection.driver_connection
    names = ", ".join(COLUMNS)
    if connection.dialect.name == "sqlite":
        raw.execute("PRAGMA synchronous = OFF")
        raw.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        statement = f"INSERT INTO audit_events ({names}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608
        rows = iter(rows)
        # The log must not grow to the size of the database before it is worked in.
        while part := list(islice(rows, LOADED_AT_ONCE)):
            raw.executemany(statement, part)
            raw.commit()
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    else:
        with raw.cursor() as cursor, cursor.copy(f"COPY audit_events ({names}) FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)
        raw.commit()


def refresh(connection: Connection) -> None:
    """Do what PostgreSQL's autovacuum does, which looks at partitions and never at the table they belong to."""
    if connection.dialect.name == "postgresql":
        partitions = partitions_of(connection, "audit_events")
        connection.commit()
        own = connection.execution_options(isolation_level="AUTOCOMMIT")
        for partition in partitions:
            own.exec_driver_sql(f"VACUUM (ANALYZE) {partition}")


def partitions_of(connection: Connection, parent: str) -> list[str]:
    """Return the names of the parts of a PostgreSQL table or index."""
    tree = sa.text("SELECT relid::regclass::text FROM pg_partition_tree(CAST(:parent AS regclass)) WHERE isleaf")
    return list(connection.execute(tree, {"parent": parent}).scalars())


def median_ms(work: Callable[[], object]) -> float:
    """Return the median of several runs after a first one, in milliseconds."""
    work()
    taken = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        taken.append((time.perf_counter() - began) * 1000)
    return statistics.median(taken)


def sizes(connection: Connection) -> dict[str, float]:
    """Return how many bytes the table and each of its indices take."""
    if connection.dialect.name == "sqlite":
        query = "SELECT name, SUM(pgsize) FROM dbstat WHERE name LIKE '%audit_events%' GROUP BY name"
        found = {str(name).removeprefix("sqlite_autoindex_"): size for name, size in connection.exec_driver_sql(query)}
        return {"audit_events_pkey" if name == "audit_events_1" else name: size for name, size in found.items()}
    names = ["audit_events", *(str(item["name"]) for item in sa.inspect(connection).get_indexes("audit_events"))]
    total = sa.text("SELECT pg_relation_size(CAST(:name AS regclass))")
    return {
        name: sum(connection.execute(total, {"name": part}).scalar_one() for part in partitions_of(connection, name))
        for name in [*names, "audit_events_pkey"]
    }


def inserting(url: str, options: Any) -> dict[str, float]:
    """Return how long an event takes to insert without the questions' indices, and with them."""
    engine = sa.create_engine(url)
    rows = Record(INSERT_RUNS * INSERTED // 3, options.days, options.seed).rows()
    figures: dict[str, float] = {}
    with engine.connect() as connection:
        definitions = {name: definition(connection, name) for name in OWN_INDICES}
        for run in range(INSERT_RUNS):
            for name, statement in definitions.items():
                connection.exec_driver_sql(f"DROP INDEX IF EXISTS {name}")
                if run % 2:
                    connection.exec_driver_sql(statement)
            connection.commit()
            batch = list(islice(rows, INSERTED))
            began = time.perf_counter()
            load(connection, batch)
            figure = f"insert {'with' if run % 2 else 'without'} own indices us/event"
            taken = (time.perf_counter() - began) / len(batch) * 1e6
            figures[figure] = min(taken, figures.get(figure, taken))
    engine.dispose()
    return figures


def definition(connection: Connection, name: str) -> str:
    """Return the statement that makes an index."""
    if connection.dialect.name == "sqlite":
        query = "SELECT sql FROM sqlite_master WHERE name = :name"
    else:
        query = "SELECT replace(pg_get_indexdef(CAST(:name AS regclass)), 'ON ONLY', 'ON')"
    return str(connection.execute(sa.text(query), {"name": name}).scalar_one())


if __name__ == "__main__":
    main()
