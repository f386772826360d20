"""The database is where a promise becomes durable: what `write` says must be true, also when it fails."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.audit.events import Subject, event
from tasks.db import Database
from tasks.db_errors import CommitUndecided
from tasks.errors import DatabaseUnavailable
from tasks.ids import new_request_id
from tasks.migrating import upgrade
from tasks.schema import audit_events
from tasks.settings import DatabaseGroup
from tests.services import PostgresServer, wait_until

ROOT = Path(__file__).resolve().parents[2]
SECRET_TEXT = "xyzzy-what-was-stored"
notes = sa.Table("notes", sa.MetaData(), sa.Column("number", sa.Integer, primary_key=True), sa.Column("text", sa.Text))

MakeDatabase = Callable[..., Database]


@pytest.fixture
def make_database(database_url: str) -> Iterator[MakeDatabase]:
    """Return a function that opens the empty database, which has the table `notes`; options are its settings."""
    engine = sa.create_engine(database_url)
    notes.metadata.create_all(engine)
    engine.dispose()
    opened: list[Database] = []

    def make(**options: Any) -> Database:
        opened.append(Database(DatabaseGroup(url=database_url, **options)))
        return opened[-1]

    yield make
    for database in opened:
        database.close()


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    """Return the path of an SQLite database in WAL mode with the table `notes`."""
    path = tmp_path / "gateway.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE notes (number INTEGER PRIMARY KEY, text TEXT)")
    connection.close()
    return path


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresServer]:
    """Return a PostgreSQL that these tests may stop and start."""
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()


def insert(number: int, text: str = "") -> Callable[[Connection], int]:
    """Return a write that stores one note and returns its number."""

    def work(connection: Connection) -> int:
        connection.execute(sa.insert(notes), {"number": number, "text": text})
        return number

    return work


def stored(database: Database) -> set[int]:
    """Return the numbers of all committed notes."""
    return set(database.read(lambda connection: list(connection.execute(sa.select(notes.c.number)).scalars())))


@contextmanager
def counted_commits() -> Iterator[list[float]]:
    """Collect one item for each commit of any engine."""
    commits: list[float] = []

    def count(_connection: Connection) -> None:
        commits.append(time.monotonic())

    sa.event.listen(sa.engine.Engine, "commit", count)
    try:
        yield commits
    finally:
        sa.event.remove(sa.engine.Engine, "commit", count)


@contextmanager
def held_writer(database: Database) -> Iterator[Future[None]]:
    """Keep the writer busy, so that what is submitted in the meantime waits together."""
    begun, go_on = threading.Event(), threading.Event()

    def work(_connection: Connection) -> None:
        begun.set()
        assert go_on.wait(30)

    future = database.submit(work)
    assert begun.wait(30)
    try:
        yield future
    finally:
        go_on.set()


def test_a_write_returns_what_its_function_returned(make_database: MakeDatabase) -> None:
    """And it is there for every reader from then on."""
    database = make_database()
    assert database.write(insert(7)) == 7
    assert stored(make_database()) == {7}


@pytest.mark.parametrize(("group_commit_max", "commits"), [(200, 2), (10, 6)])
def test_writes_that_wait_share_a_commit(make_database: MakeDatabase, group_commit_max: int, commits: int) -> None:
    """50 writes cost one commit, or five where ten may share one; one more is the write that they waited for."""
    database = make_database(group_commit_max=group_commit_max)
    with counted_commits() as counted:
        with held_writer(database) as first:
            futures = [database.submit(insert(number)) for number in range(50)]
            assert not any(future.done() for future in futures)
        assert [future.result(30) for future in futures] == list(range(50))
        first.result(30)
    assert len(counted) == commits
    assert stored(database) == set(range(50))


def test_what_comes_while_another_process_writes_shares_the_commit(sqlite_path: Path) -> None:
    """Who waits for the lock anyway takes along whatever came meanwhile."""
    database = Database(DatabaseGroup(url=f"sqlite:///{sqlite_path}", timeout_s=60))
    try:
        with counted_commits() as counted:
            with sqlite3.connect(sqlite_path, isolation_level=None) as other:
                other.execute("BEGIN IMMEDIATE")
                first = database.submit(insert(0))
                wait_until(first.running, 30, "the writer to wait")
                others = [database.submit(insert(number)) for number in range(1, 6)]
                other.execute("COMMIT")
            assert [future.result(60) for future in (first, *others)] == list(range(6))
        assert len(counted) == 1
        assert stored(database) == set(range(6))
    finally:
        database.close()


def test_concurrent_writers_commit_in_groups(make_database: MakeDatabase) -> None:
    """Also when nobody holds them back: 400 writes of 16 threads need far fewer commits."""
    database = make_database()
    with counted_commits() as counted, ThreadPoolExecutor(16) as threads:
        assert list(threads.map(lambda number: database.write(insert(number)), range(400))) == list(range(400))
    assert len(counted) < 200
    assert stored(database) == set(range(400))


def test_a_result_is_given_after_the_commit(make_database: MakeDatabase) -> None:
    """Whoever gets a result may tell the world: another connection sees the row then."""
    database, other = make_database(), make_database()
    seen: list[bool] = []
    futures = []
    with held_writer(database):
        for number in range(20):
            future = database.submit(insert(number))
            future.add_done_callback(lambda done: seen.append(done.result() in stored(other)))
            futures.append(future)
    for future in futures:
        future.result(30)
    wait_until(lambda: len(seen) == 20, 10, "all callbacks")
    assert all(seen)


def test_one_failing_write_fails_alone(make_database: MakeDatabase) -> None:
    """Of a group, each culprit gets its own error, and all others are committed, once each."""
    database = make_database()
    database.write(insert(3))

    def broken(connection: Connection) -> None:
        insert(1000)(connection)
        raise LookupError("mine")

    with held_writer(database):
        futures: dict[int, Future[Any]] = {number: database.submit(insert(number)) for number in range(10)}
        culprit = database.submit(broken)
        late = database.submit(insert(11))
    assert isinstance(futures.pop(3).exception(30), sa.exc.IntegrityError)
    with pytest.raises(LookupError, match="mine"):
        culprit.result(30)
    assert {number: future.result(30) for number, future in futures.items()} == {n: n for n in futures}
    assert late.result(30) == 11
    assert stored(database) == {*range(10), 11}


def test_one_write_that_times_out_fails_alone(make_database: MakeDatabase, database_url: str) -> None:
    """The database is there, and only one write's statement is ended by it: the others of the group are committed."""
    database = make_database(timeout_s=0.5)
    statement = "SELECT pg_sleep(30)" if database_url.startswith("postgresql") else "SELECT * FROM no_such_table"
    with held_writer(database):
        futures = [database.submit(insert(number)) for number in range(3)]
        culprit = database.submit(lambda connection: connection.exec_driver_sql(statement))
        futures.append(database.submit(insert(3)))
    assert isinstance(culprit.exception(30), DatabaseUnavailable)
    assert [future.exception(30) for future in futures] == [None] * 4
    assert stored(database) == set(range(4))


def test_the_writer_outlives_every_error(make_database: MakeDatabase) -> None:
    """A failed write changes nothing and leaves a transaction that the next one can use."""
    database = make_database()
    for error in (ValueError("x"), RuntimeError("x"), KeyError("x"), TimeoutError("x")):

        def work(connection: Connection, error: Exception = error) -> None:
            insert(1)(connection)
            raise error

        with pytest.raises(type(error)):
            database.write(work)
        assert stored(database) == set()
    assert database.write(insert(1)) == 1


def test_a_write_that_times_out_is_never_committed(make_database: MakeDatabase) -> None:
    """A caller who was told "no" can ask again: the write that waited too long is dropped, not done later."""
    database = make_database(timeout_s=0.2)
    with held_writer(database) as first:
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            database.write(insert(1))
        assert time.monotonic() - began < 2
    first.result(30)
    assert database.write(insert(2)) == 2
    assert stored(database) == {2}


def test_closing_commits_what_waits(make_database: MakeDatabase) -> None:
    """A clean stop loses nothing that was submitted before it."""
    database = make_database()
    with held_writer(database):
        futures = [database.submit(insert(number)) for number in range(30)]
        closing = threading.Thread(target=database.close)
        closing.start()
    closing.join(30)
    assert [future.result(0) for future in futures] == list(range(30))
    assert stored(make_database()) == set(range(30))


def test_writing_to_a_closed_database(make_database: MakeDatabase) -> None:
    """It fails with the usual error, after the usual wait at most, and is not done."""
    database = make_database(timeout_s=0.2)
    database.close()
    with pytest.raises(DatabaseUnavailable):
        database.write(insert(1))
    assert stored(make_database()) == set()


def test_reading_does_not_change_anything(make_database: MakeDatabase) -> None:
    """What a read writes is not committed."""
    database = make_database()
    database.read(insert(1))
    assert stored(database) == set()


def test_readers_leave_the_writer_its_connection(
    make_database: MakeDatabase, request: pytest.FixtureRequest, database_url: str
) -> None:
    """`pool_size` counts connections for reading; writing has one of its own, or slow readers would stop admission."""
    database = make_database(pool_size=2, timeout_s=0.5)
    reading, done = threading.Barrier(3), threading.Event()

    def slow(connection: Connection) -> None:
        connection.execute(sa.select(notes)).all()
        reading.wait(30)
        done.wait(30)

    with ThreadPoolExecutor(2) as threads:
        readers = [threads.submit(database.read, slow) for _ in range(2)]
        reading.wait(30)
        try:
            assert database.write(insert(1)) == 1
        finally:
            done.set()
        for reader in readers:
            reader.result(30)


# --- The database is away -------------------------------------------------------------------------


def test_postgresql_stopped_and_started(own_postgres: PostgresServer, caplog: pytest.LogCaptureFixture) -> None:
    """Both reading and writing say that it is away, soon; and both work again when it is back, without a new object."""
    url = own_postgres.url(own_postgres.create_database())
    _create_notes(url)
    database = Database(DatabaseGroup(url=url, timeout_s=2))
    try:
        database.write(insert(1))
        for end in (own_postgres.stop, own_postgres.kill):
            end()
            try:
                began = time.monotonic()
                for _ in range(2):
                    with pytest.raises(DatabaseUnavailable):
                        database.write(insert(2, SECRET_TEXT))
                    with pytest.raises(DatabaseUnavailable):
                        database.read(lambda connection: connection.execute(sa.select(notes)).all())
                assert time.monotonic() - began < 10
            finally:
                own_postgres.start()
            assert stored(database) == {1}
        assert database.write(insert(2)) == 2
        assert stored(database) == {1, 2}
    finally:
        database.close()
    assert SECRET_TEXT not in caplog.text
    assert any("database unavailable" in record.message for record in caplog.records)


def test_a_restart_of_postgresql_between_two_requests(own_postgres: PostgresServer) -> None:
    """Nobody was waiting, so nobody sees an error: connections that died in the meantime are replaced."""
    url = own_postgres.url(own_postgres.create_database())
    _create_notes(url)
    database = Database(DatabaseGroup(url=url, timeout_s=2))
    try:
        database.write(insert(1))
        assert stored(database) == {1}
        own_postgres.stop()
        own_postgres.start()
        assert stored(database) == {1}
        assert database.write(insert(2)) == 2
    finally:
        database.close()


def test_postgresql_dies_in_the_middle_of_a_write(own_postgres: PostgresServer) -> None:
    """Nothing of it is committed, and the caller knows."""
    url = own_postgres.url(own_postgres.create_database())
    _create_notes(url)
    database = Database(DatabaseGroup(url=url, timeout_s=2))
    stored_first, go_on = threading.Event(), threading.Event()

    def work(connection: Connection) -> None:
        insert(1)(connection)
        stored_first.set()
        assert go_on.wait(30)
        insert(2)(connection)

    try:
        future = database.submit(work)
        assert stored_first.wait(30)
        own_postgres.stop()
        go_on.set()
        with pytest.raises(DatabaseUnavailable):
            future.result(30)
        own_postgres.start()
        assert stored(database) == set()
    finally:
        database.close()


def test_a_slow_statement_is_ended(postgres_url: str) -> None:
    """The database's own time-out bounds a statement; nothing is committed, and the writer goes on."""
    _create_notes(postgres_url)
    database = Database(DatabaseGroup(url=postgres_url, timeout_s=0.3))

    def work(connection: Connection) -> None:
        insert(1)(connection)
        connection.exec_driver_sql("SELECT pg_sleep(30)")

    try:
        with pytest.raises(DatabaseUnavailable):
            database.write(work)
        with pytest.raises(DatabaseUnavailable):
            database.read(lambda connection: connection.exec_driver_sql("SELECT pg_sleep(30)"))
        assert database.write(insert(2)) == 2
        assert stored(database) == {2}
    finally:
        database.close()


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    """Let another process hold the lock of an SQLite database."""
    code = (
        "import sqlite3, sys; connection = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "connection.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield
        finally:
            process.communicate("\n", timeout=30)


def test_sqlite_locked_by_another_process(sqlite_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writing fails after its time-out and works again after the lock; reading goes on all the while."""
    database = Database(DatabaseGroup(url=f"sqlite:///{sqlite_path}", timeout_s=0.3))
    try:
        with locked_by_another_process(sqlite_path):
            for _ in range(2):
                began = time.monotonic()
                with pytest.raises(DatabaseUnavailable):
                    database.write(insert(1, SECRET_TEXT))
                assert 0.2 < time.monotonic() - began < 3
            assert stored(database) == set()
        assert database.write(insert(1)) == 1
        assert stored(database) == {1}
    finally:
        database.close()
    assert SECRET_TEXT not in caplog.text


def test_sqlite_that_is_not_in_wal_mode_and_locked(tmp_path: Path) -> None:
    """Also where the lock is met while connecting, as on the first start, callers get the usual error."""
    path = tmp_path / "gateway.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (number INTEGER PRIMARY KEY, text TEXT)")
    connection.close()
    database = Database(DatabaseGroup(url=f"sqlite:///{path}", timeout_s=0.2))
    try:
        with locked_by_another_process(path):
            with pytest.raises(DatabaseUnavailable):
                database.write(insert(1))
            with pytest.raises(DatabaseUnavailable):
                stored(database)
        assert database.write(insert(1)) == 1
    finally:
        database.close()


def test_all_waiting_writes_fail_soon_when_the_database_is_away(sqlite_path: Path) -> None:
    """Writes that arrive while another waits for a locked database all have their answer within a few time-outs."""
    timeout_s = 0.25
    database = Database(DatabaseGroup(url=f"sqlite:///{sqlite_path}", timeout_s=timeout_s))
    try:
        with locked_by_another_process(sqlite_path), ThreadPoolExecutor(8) as threads:
            first = database.submit(insert(100))
            wait_until(first.running, 5, "the writer to begin")
            threading.Event().wait(timeout_s / 2)  # So that the others still wait when the first one's time is over.
            began = time.monotonic()
            futures = [threads.submit(database.write, insert(number)) for number in range(8)]
            assert all(isinstance(future.exception(60), DatabaseUnavailable) for future in futures)
            took_s = time.monotonic() - began
    finally:
        database.close()
    assert took_s < 5 * timeout_s, f"{took_s / timeout_s:.1f} time-outs"


def test_the_answer_to_a_commit_is_lost(make_database: MakeDatabase) -> None:
    """What is committed counts as done, or as undecided: never as refused, nor as the caller's own mistake."""
    database = make_database()
    commits: list[Connection] = []

    def lose(connection: Connection) -> None:
        commits.append(connection)
        if len(commits) == 2:
            driver = connection.connection.driver_connection
            assert driver is not None
            driver.commit()
            raise sa.exc.OperationalError("COMMIT", None, OSError("the connection is gone"))

    sa.event.listen(sa.engine.Engine, "commit", lose)
    try:
        with held_writer(database) as first:
            futures = [database.submit(insert(number)) for number in range(2)]
        assert first.exception(30) is None
        errors = [future.exception(30) for future in futures]
    finally:
        sa.event.remove(sa.engine.Engine, "commit", lose)
    assert stored(database) == {0, 1}
    assert {type(error) for error in errors} <= {type(None), CommitUndecided}


# --- Several processes ----------------------------------------------------------------------------

#: Writes the given numbers one by one, as fast as it can.
WRITER = """
import sys
import sqlalchemy as sa
from tasks.db import Database
from tasks.settings import DatabaseGroup

database = Database(DatabaseGroup(url=sys.argv[1]))
def work(number):
    def run(connection):
        highest = connection.execute(sa.text("SELECT COALESCE(MAX(number), 0) FROM notes")).scalar_one()
        connection.execute(sa.text("INSERT INTO notes VALUES (:n, :t)"), {"n": number, "t": str(highest)})
    return run
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    database.write(work(number))
database.close()
"""


def test_two_processes_write_to_one_sqlite_database(sqlite_path: Path) -> None:
    """Writes that read first don't deadlock, none is lost, and none fails: the write lock is taken at the beginning."""
    url = f"sqlite:///{sqlite_path}"
    ranges = [(0, 150), (1000, 1150)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, *map(str, numbers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for numbers in ranges
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert errors == ["", ""]
    database = Database(DatabaseGroup(url=url))
    try:
        assert stored(database) == {number for start, end in ranges for number in range(start, end)}
    finally:
        database.close()


# --- What errors say ------------------------------------------------------------------------------


def _secret_event(kind: str, **changes: Any) -> Callable[[Connection], None]:
    row = event(Subject(new_request_id(), "acme", "key_1"), kind, reason=SECRET_TEXT, details={"veto": SECRET_TEXT})

    def work(connection: Connection) -> None:
        connection.execute(sa.insert(audit_events), {**row, **changes})

    return work


def _twice(work: Callable[[Connection], None]) -> Callable[[Connection], None]:
    def run(connection: Connection) -> None:
        work(connection)
        work(connection)

    return run


@pytest.mark.parametrize(
    ("mistake", "shown_by_postgresql"),
    [
        ("unknown kind", True),
        ("missing value", True),
        ("duplicate", False),
        ("bad value", False),
        ("no such column", False),
    ],
)
def test_errors_do_not_show_values(
    mistake: str,
    shown_by_postgresql: bool,
    make_database: MakeDatabase,
    database_url: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither the error's text, nor that of its causes, nor the log has a value that was to be stored."""
    upgrade(database_url)
    works: dict[str, Callable[[Connection], Any]] = {
        "unknown kind": _secret_event("nonsense"),
        "missing value": _secret_event("received", organization=None),
        "duplicate": _twice(_secret_event("received")),
        "bad value": _secret_event("received", occurred_at=SECRET_TEXT),
        "no such column": lambda connection: connection.execute(
            sa.text("SELECT no_such_column FROM notes WHERE text = :text"), {"text": SECRET_TEXT}
        ),
    }
    caplog.set_level(logging.DEBUG)
    error: BaseException | None = make_database().submit(works[mistake]).exception(30)
    assert error is not None
    texts = [caplog.text]
    while error is not None:
        texts.append(str(error) + repr(error))
        error = error.__cause__ or error.__context__
    assert SECRET_TEXT not in "\n".join(texts)


def _create_notes(url: str) -> None:
    engine = sa.create_engine(url)
    notes.metadata.create_all(engine)
    engine.dispose()
