"""Events are read in the order of their commits: none is passed over, none is met twice, on both databases."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.engine import Connection

from gateway_app.audit import commits
from gateway_app.audit.trail import EventName
from tasks.db import Database
from tasks.errors import FollowRefused
from tasks.ids import new_request_id
from tasks.migrating import MIGRATIONS, upgrade
from tasks.schema import audit_events
from tests.gateway_app.audit.recording import add, engine_of, fill, names, opened

Read = Callable[[Connection, EventName | None, int], list[EventName]]


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    """Return an empty record."""
    with opened(migrated_url) as made:
        yield made


def in_commit_order(connection: Connection, last: EventName | None, limit: int) -> list[EventName]:
    """Read as the product does."""
    return [EventName.of(row) for row in commits.after(connection, last, limit).rows]


def by_name(connection: Connection, last: EventName | None, limit: int) -> list[EventName]:
    """Read as one would first think of: what has a higher id is newer."""
    key = (audit_events.c.request_id, audit_events.c.kind, audit_events.c.attempt)
    query = sa.select(*key).order_by(*key).limit(limit)
    if last is not None:
        query = query.where(sa.tuple_(*key) > sa.tuple_(last.request_id, last.kind, last.attempt))
    return [EventName(*row) for row in connection.execute(query)]


def everything(database: Database, last: EventName | None, read: Read, limit: int = 3) -> list[EventName]:
    """Read to the end, a few at a time."""
    found: list[EventName] = []

    def page(connection: Connection) -> list[EventName]:
        return read(connection, found[-1] if found else last, limit)

    while more := database.read(page):
        found += more
    return found


def test_in_order_and_whole(database: Database) -> None:
    """In the order of the commits, in pages of any size, and the same when it is read again."""
    assert everything(database, None, in_commit_order) == []
    written = fill(database, 7, "acme", "other")
    for limit in (1, 2, 3, 7, 100):
        assert everything(database, None, in_commit_order, limit) == written
    more = fill(database, 2)
    assert everything(database, written[-1], in_commit_order) == more


def test_many_events_of_one_commit(database: Database) -> None:
    """A page may end in the middle of a commit."""
    written = database.write(lambda connection: [add(connection) for _ in range(10)])
    assert sorted(everything(database, None, in_commit_order), key=str) == sorted(written, key=str)


@pytest.mark.parametrize("read", [in_commit_order, by_name])
def test_a_commit_that_comes_late(postgres_url: str, read: Read) -> None:
    """On PostgreSQL an event may appear behind one that was read already; reading by names loses it, as it must here."""
    upgrade(postgres_url)
    with opened(postgres_url) as database, engine_of(postgres_url) as engine, engine.begin() as slow:
        late = add(slow)
        early = fill(database, 2)
        met = everything(database, None, read)
        slow.commit()
        met += everything(database, met[-1] if met else None, read)
    assert (sorted(met, key=str) == sorted([late, *early], key=str)) == (read is in_commit_order)


def test_it_tells_that_events_wait(postgres_url: str) -> None:
    """Behind a transaction that runs; not when there is nothing."""
    upgrade(postgres_url)
    with opened(postgres_url) as database, engine_of(postgres_url) as engine:
        assert not database.read(lambda connection: commits.after(connection, None, 9)).held_back
        with engine.begin() as slow:
            add(slow)
            fill(database, 1)
            assert database.read(lambda connection: commits.after(connection, None, 9)).held_back
        assert not database.read(lambda connection: commits.after(connection, None, 9)).held_back


def test_what_was_taken_back(database: Database) -> None:
    """A commit that failed leaves no event and hides none."""

    def fail(connection: Connection) -> None:
        add(connection)
        raise ValueError

    first = fill(database, 1)
    with pytest.raises(ValueError, match=r"^$"):
        database.write(fail)
    written = first + fill(database, 1)
    assert everything(database, None, in_commit_order) == written


def test_while_many_write(migrated_url: str) -> None:
    """Each event is met once while transactions of several writers overlap and end in any order."""
    seed = random.randrange(10**6)
    print("seed", seed)
    ready = threading.Barrier(4)

    def write(number: int) -> None:
        chance = random.Random(seed + number)
        with engine_of(migrated_url) as engine:
            ready.wait()
            for _ in range(40):
                with engine.execution_options(immediate=True).begin() as connection:
                    for _ in range(chance.randrange(1, 4)):
                        add(connection)
                    if engine.dialect.name != "sqlite":
                        connection.execute(sa.text("SELECT pg_sleep(:s)"), {"s": chance.random() * 0.008})
                    if chance.random() < 0.2:
                        connection.rollback()

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    met: list[EventName] = []
    with opened(migrated_url) as database:
        ready.wait()
        while any(writer.is_alive() for writer in writers):
            met += everything(database, met[-1] if met else None, in_commit_order)
        met += everything(database, met[-1] if met else None, in_commit_order)
        assert len(met) > 100
        assert sorted(met, key=str) == sorted(names(database), key=str)


def test_another_database(database: Database) -> None:
    """The last event is not in it: that is said, instead of beginning anywhere."""
    fill(database, 1)
    stranger = EventName(new_request_id(), "received", 0)
    with pytest.raises(FollowRefused, match=stranger.request_id):
        database.read(lambda connection: commits.after(connection, stranger, 9))


def test_a_database_restored_from_one_that_counted_further(postgres_url: str) -> None:
    """Its new events would lie before those that were followed already, and would be passed over."""
    upgrade(postgres_url)
    with opened(postgres_url) as database:
        database.write(lambda connection: add(connection, written_in=2**40))
        with pytest.raises(FollowRefused, match=str(2**40)):
            database.read(lambda connection: commits.after(connection, None, 9))


def test_events_of_the_release_before(database_url: str) -> None:
    """They are still there after the migration, as they were, and are followed before all newer ones."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = database_url
    command.upgrade(config, "0005")
    columns = [column for column in audit_events.c if column.name != "written_in"]
    query = sa.select(*columns).order_by(audit_events.c.request_id)
    with engine_of(database_url) as engine, engine.begin() as connection:
        old = [add(connection, details={"psmp": {"n": number}}) for number in range(4)]
        before = connection.execute(query).all()
    upgrade(database_url)
    with opened(database_url) as database:
        assert database.read(lambda connection: connection.execute(query).all()) == before
        new = fill(database, 3)
        assert everything(database, None, in_commit_order) == old + new


def test_a_gateway_that_says_no_transaction(database: Database) -> None:
    """The column fills itself, which a release that does not know it relies on."""
    fill(database, 2)
    query = sa.select(audit_events.c.written_in).order_by(audit_events.c.written_in)
    numbers, kind = database.read(
        lambda connection: (connection.execute(query).scalars().all(), connection.dialect.name)
    )
    if kind == "sqlite":
        assert numbers == [0, 0]
    else:
        assert 0 < numbers[0] < numbers[1]
