"""The database: one engine for reading, one thread for writing.

Writing is grouped. Callers hand a function of a connection to `Database.write` and wait; the writer thread takes all
that are waiting, also those that came while another process's transaction had to end first, runs them in one transaction
and commits once, so that the cost of a durable commit is shared by the requests that arrived together. If one of them
fails, the transaction is rolled back and each runs again in a transaction of its own, so that only the culprit fails. A
function may therefore run twice, and must do nothing but SQL on the connection it is given.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tasks.db_engine import create_engine
from tasks.db_errors import as_told, is_away, is_read_only, unavailable
from tasks.db_statements import Statement
from tasks.errors import DatabaseUnavailable
from tasks.metrics import shared as metrics
from tasks.settings import DatabaseGroup

T = TypeVar("T")
#: Where a connection's `info` has the kinds and codes of the events that its transaction adds, to be counted afterwards.
ADDED = "metaqore_events_added"


@dataclass(frozen=True, slots=True)
class DatabaseLoad:
    """Connections for reading that are in use, idle, and kept; writes that wait, and the age of the oldest in seconds."""

    in_use: int
    idle: int
    size: int
    uncommitted: int
    uncommitted_s: float


def now() -> datetime:
    """Return the current instant in UTC."""
    return datetime.now(UTC)


class Database:
    """A connection pool to read with, and a writer thread that groups commits."""

    def __init__(self, settings: DatabaseGroup) -> None:
        self._settings = settings
        self._engine = create_engine(settings, settings.pool_size)
        # The writer's own: readers that hold every connection must not keep an answer from being recorded.
        # SQLite must take its write lock before it reads, or two processes deadlock on the upgrade.
        self._writing = create_engine(settings, 1).execution_options(immediate=True)
        self._waiting: queue.SimpleQueue[_Write[Any] | None] = queue.SimpleQueue()
        self._committing: list[_Write[Any]] = []
        self._closing = False
        self._writer = threading.Thread(target=self._write_forever, name="database-writer", daemon=True)
        self._writer.start()

    def read(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returns, run in a transaction that sees committed data.

        Raises DatabaseUnavailable if the database cannot be reached.
        """
        with _told_as_unavailable(), self._engine.connect() as connection:
            return work(connection)

    def row(self, query: Statement, parameters: Mapping[str, Any]) -> sa.Row[Any] | None:
        """Return the one row that `query` gives, or None. One statement needs no transaction around it.

        Raises DatabaseUnavailable if the database cannot be reached.
        """
        with _told_as_unavailable(), self._engine.connect() as connection:
            return query.alone(connection, parameters)

    @property
    def timeout_s(self) -> float:
        """Return the longest wait for a connection, a lock or a statement, in seconds."""
        return self._settings.timeout_s

    @property
    def load(self) -> DatabaseLoad:
        """Return how much the database has to do for this process now."""
        pool: Any = self._engine.pool
        group, at = self._committing, time.monotonic()
        return DatabaseLoad(
            in_use=pool.checkedout(),
            idle=pool.checkedin(),
            size=self._settings.pool_size,
            uncommitted=len(group) + self._waiting.qsize(),
            uncommitted_s=at - group[0].handed_over_at if group else 0.0,
        )

    def write(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returned, once it is committed.

        Raises DatabaseUnavailable if it could not be committed; then nothing of it was. If it is CommitUndecided, all of
        it may have been: the database went away after it was told to commit and before it said that it has.
        """
        future = self.submit(work)
        try:
            return future.result(timeout=self._settings.timeout_s)
        except FutureTimeout:
            if future.cancel():
                raise DatabaseUnavailable("the database is too slow to take more requests") from None
            # It is being committed this moment; the database's own time-outs bound this wait.
            return future.result()

    def submit(self, work: Callable[[Connection], T]) -> Future[T]:
        """Queue `work` for the writer and return a future of its result, set once it is committed."""
        write = _Write(work)
        self._waiting.put(write)
        return write.future

    def close(self) -> None:
        """Commit what is waiting, end the writer and close all connections."""
        self._waiting.put(None)
        self._writer.join()
        self._engine.dispose()
        self._writing.dispose()

    def _write_forever(self) -> None:
        while not self._closing and (first := self._waiting.get()) is not None:
            self._committing = group = [first] if first.future.set_running_or_notify_cancel() else []
            self._gather(group)
            if group:
                self._commit(group)
            self._committing = []

    def _gather(self, group: list[_Write[Any]]) -> None:
        """Add what waits to the group, unless its caller waits no more."""
        while len(group) < self._settings.group_commit_max and not self._closing and not self._waiting.empty():
            write = self._waiting.get()
            self._closing = write is None
            if write is not None and write.future.set_running_or_notify_cancel():
                group.append(write)

    def _commit(self, group: list[_Write[Any]]) -> None:
        """Run the group in one transaction; where one of them fails, each in one of its own."""
        try:
            self._transact(group, gathers=True)
        except _Away as away:
            _fail(group, away.told())
        except Exception as error:  # whatever it is belongs to a caller; the writer must live on
            if len(group) == 1:
                _fail(group, as_told(error))
            else:
                self._commit_each(group)

    def _commit_each(self, group: list[_Write[Any]]) -> None:
        for index, write in enumerate(group):
            try:
                self._transact([write])
            except _Away as away:
                # Nobody's fault, and so everybody's answer; trying each would have the last wait for all time-outs.
                _fail([write], away.told())
                _fail(group[index + 1 :], unavailable(away.error))
                return
            except Exception as error:  # as above
                _fail([write], as_told(error))

    def _transact(self, group: list[_Write[Any]], *, gathers: bool = False) -> None:
        """Commit the group and tell its callers. Raises _Away if the database is, else what a function raised.

        If it `gathers`, what came by the time when the transaction had begun belongs to the group too.
        """
        began = time.monotonic()
        with _noticing_absence():
            connection = self._writing.connect()
        with connection:
            with _noticing_absence():
                transaction = connection.begin()
            if gathers:
                self._gather(group)
            added: list[tuple[str, str | None]] = []
            connection.info[ADDED] = added
            try:
                results = [write.work(connection) for write in group]
            except sa.exc.DBAPIError as error:
                if is_read_only(error):
                    connection.invalidate()
                if connection.invalidated:
                    raise _Away(error) from None
                raise
            with _noticing_absence(undecided=True):
                transaction.commit()
        metrics.committed(began, group[0].handed_over_at, len(group), added)
        for write, result in zip(group, results, strict=True):
            write.future.set_result(result)


class _Away(Exception):
    """The database is away, as the driver said with `error`; `undecided` if it was told to commit before."""

    def __init__(self, error: Exception, *, undecided: bool = False) -> None:
        super().__init__()
        self.error, self.undecided = error, undecided
        metrics.COMMITS_FAILED.labels("undecided" if undecided else "away").inc()

    def told(self) -> DatabaseUnavailable:
        """Return what the callers are told whose work it was."""
        return unavailable(self.error, undecided=self.undecided)


@contextmanager
def _noticing_absence(*, undecided: bool = False) -> Iterator[None]:
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        if is_away(error):
            raise _Away(error, undecided=undecided) from None
        raise


@contextmanager
def _told_as_unavailable() -> Iterator[None]:
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        if is_away(error):
            raise unavailable(error) from None
        raise


def _fail(group: list[_Write[Any]], error: Exception) -> None:
    for write in group:
        write.future.set_exception(error)


class _Write(Generic[T]):
    """One function waiting for the writer."""

    __slots__ = ("future", "handed_over_at", "work")

    def __init__(self, work: Callable[[Connection], T]) -> None:
        self.work = work
        self.handed_over_at = time.monotonic()
        self.future: Future[T] = Future()
