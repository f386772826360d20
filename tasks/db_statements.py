"""Statements that every request needs, compiled once and given to the driver as they are.

SQLAlchemy takes 25 µs to run a statement beyond what the driver takes: it looks the statement up among those it has compiled,
and makes a context, a result and an event of each call. A request has ten of them. These are compiled once for each dialect
and run on the driver's own connection, within the transaction that SQLAlchemy began. Values are converted as their columns' types
say and errors are told as SQLAlchemy tells them, so callers see no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Dialect, Row
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine

_Convert = Callable[[Any], Any] | None


class _Parameter(NamedTuple):
    """A value that a statement takes; one without a `value` of its own must be given."""

    name: str
    convert: _Convert
    required: bool
    value: Any


class Statement:
    """One statement. `columns` are those that an INSERT or UPDATE sets beside its own values; left out, they are NULL.

    Parameters are named, as `sa.bindparam` and the columns are.
    """

    def __init__(self, statement: sa.Select[Any] | sa.UpdateBase, columns: Collection[str] = ()) -> None:
        self._statement = statement
        self._columns = tuple(columns)
        self._compiled: dict[str, _Compiled] = {}

    def one(self, connection: Connection, parameters: Mapping[str, Any]) -> Row[Any]:
        """Return the one row that it gives. Raises NoResultFound, MultipleResultsFound."""
        row = self.one_or_none(connection, parameters)
        if row is None:
            raise sa.exc.NoResultFound
        return row

    def one_or_none(self, connection: Connection, parameters: Mapping[str, Any]) -> Row[Any] | None:
        """Return the one row that it gives, or None. Raises MultipleResultsFound."""
        return self.alone(_begun(connection), parameters)

    def alone(self, connection: Connection, parameters: Mapping[str, Any]) -> Row[Any] | None:
        """Return the same, without a transaction around it."""
        compiled = self._for(connection)
        with _told(connection, compiled.error):
            cursor = _driver(connection).cursor()
            cursor.execute(compiled.sql, compiled.bound(parameters))
            found = cursor.fetchall()
        return compiled.row(found, cursor.description)

    def run(self, connection: Connection, parameters: Mapping[str, Any]) -> int:
        """Return how many rows it changed."""
        compiled = self._for(_begun(connection))
        with _told(connection, compiled.error):
            cursor = _driver(connection).cursor()
            cursor.execute(compiled.sql, compiled.bound(parameters))
        return int(cursor.rowcount)

    def run_each(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Run it once for each of `rows`."""
        compiled = self._for(_begun(connection))
        with _told(connection, compiled.error):
            _driver(connection).cursor().executemany(compiled.sql, [compiled.bound(row) for row in rows])

    def _for(self, connection: Connection) -> _Compiled:
        dialect = connection.dialect
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            # Two threads may do so at once, to the same end.
            compiled = self._compiled[dialect.name] = _Compiled(self._statement, self._columns, dialect)
        return compiled


def _begun(connection: Connection) -> Connection:
    """Return a connection in a transaction, as SQLAlchemy does: or a commit that follows would commit nothing."""
    if not connection.in_transaction():
        connection.begin()
    return connection


def insertion(table: sa.Table, *, returning: bool = False) -> Statement:
    """Return the INSERT into `table` that takes all columns but those that the database has a default for.

    With `returning` it gives the row as it was stored.
    """
    statement = sa.insert(table)
    columns = [column.name for column in table.c if column.server_default is None]
    return Statement(statement.returning(*table.c) if returning else statement, columns)


def _driver(connection: Connection) -> Any:
    return connection.connection.driver_connection


@contextmanager
def _told(connection: Connection, kind: type[Exception]) -> Iterator[None]:
    """Raise the driver's errors, which are of this `kind`, as SQLAlchemy does; a lost connection is marked as such."""
    try:
        yield
    except kind as error:
        away = connection.dialect.is_disconnect(cast("Any", error), _driver(connection), None)
        if away:
            connection.invalidate(error)
        raise sa.exc.DBAPIError.instance(
            None, None, error, kind, hide_parameters=True, connection_invalidated=away
        ) from error


class _Compiled:
    """A statement in one dialect. `error` is what its driver's errors have in common."""

    def __init__(self, statement: sa.Select[Any] | sa.UpdateBase, columns: tuple[str, ...], dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=columns or None)
        self.sql = str(compiled)
        self.error: type[Exception] = dialect.loaded_dbapi.Error
        self._dialect = dialect
        self._positional = compiled.positional
        self._names = [str(name) for name in (compiled.positiontup or compiled.binds)]
        self._parameters = [_parameter(compiled, name, columns, dialect) for name in self._names]
        self._known = frozenset(self._names)
        returned = statement.selected_columns if isinstance(statement, sa.Select) else statement.exported_columns
        self._types = [column.type for column in returned]
        self._metadata = SimpleResultMetaData([str(column.key) for column in returned])
        self._converters: list[_Convert] = []

    def bound(self, parameters: Mapping[str, Any]) -> Sequence[Any] | Mapping[str, Any]:
        """Return parameters as the driver takes them. Raises TypeError for one that the statement does not know."""
        if not self._known.issuperset(parameters):
            raise TypeError(f"the statement takes no {', '.join(sorted(parameters.keys() - self._known))}")
        values = []
        for name, convert, required, own in self._parameters:
            if required or name in parameters:
                value = parameters[name]
                values.append(value if convert is None else convert(value))
            else:
                values.append(own)
        return values if self._positional else dict(zip(self._names, values, strict=True))

    def row(self, found: Sequence[Sequence[Any]], description: Any) -> Row[Any] | None:
        """Return the one row that was found, converted, or None. `description` is the driver's, of its columns."""
        if found and not self._converters:
            # What has to be converted may depend on what the driver says of a column.
            described = zip(self._types, description, strict=True)
            self._converters = [_from_driver(kind, self._dialect, column[1]) for kind, column in described]
        rows = (tuple(map(_converted, self._converters, row)) for row in found)
        result: IteratorResult[Any] = IteratorResult(self._metadata, rows)
        return result.one_or_none()


def _converted(convert: _Convert, value: Any) -> Any:
    return value if convert is None else convert(value)


def _from_driver(kind: TypeEngine[Any], dialect: Dialect, described: Any) -> _Convert:
    return kind.dialect_impl(dialect).result_processor(dialect, described)


def _parameter(compiled: SQLCompiler, name: str, columns: tuple[str, ...], dialect: Dialect) -> _Parameter:
    bind = compiled.binds[name]
    convert = bind.type.dialect_impl(dialect).bind_processor(dialect)
    if name in columns:
        return _Parameter(name, convert, required=False, value=None)
    own = None if bind.required else _converted(convert, bind.effective_value)
    return _Parameter(name, convert, bind.required, own)
