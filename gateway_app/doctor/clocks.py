"""The clocks of this host, of Redis and of the database: leases go by Redis's, deadlines and retries by the hosts'."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import sqlalchemy as sa

from gateway_app.doctor.connecting import QUEUE_AWAY, is_sqlite, reading, redis_client
from gateway_app.doctor.finding import Finding, fail, ok, unknown, warn
from tasks.settings import Settings

#: From here on in seconds: times in the record no longer agree; deadlines and batches' claims are missed.
NOTABLE_S, HARMFUL_S = 1.0, 10.0
REMEDY = "timedatectl set-ntp true, on every host"


def examine(settings: Settings) -> Iterator[Finding]:
    """Compare this host's clock with the others'."""
    try:
        with redis_client(settings) as client:
            client.ping()
            yield _compared("clock of redis", lambda: _redis_time(client))
    except QUEUE_AWAY:
        yield unknown("clock of redis", "Redis cannot be asked")
    if is_sqlite(settings):
        return
    try:
        with reading(settings) as connection:
            query = sa.text("SELECT extract(epoch FROM clock_timestamp())")
            yield _compared("clock of database", lambda: float(connection.execute(query).scalar_one()))
    except sa.exc.SQLAlchemyError:
        yield unknown("clock of database", "the database cannot be asked")


def _redis_time(client: Any) -> float:
    seconds, microseconds = cast("tuple[int, int]", client.time())
    return seconds + microseconds / 1e6


def _compared(name: str, ask: Callable[[], float]) -> Finding:
    """Return how far its clock is off, beyond what the time for asking explains."""
    before = time.time()
    theirs = ask()
    after = time.time()
    skew_s = max(before - theirs, theirs - after, 0.0)
    if skew_s < NOTABLE_S:
        return ok(name, f"it agrees with this host's to {max(skew_s, after - before) * 1000:.0f} ms")
    says = f"it and this host's are {skew_s:.1f} s apart"
    return fail(name, says, REMEDY) if skew_s >= HARMFUL_S else warn(name, says, REMEDY)
