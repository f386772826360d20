"""A batch's middle: keep a window of its lines under way as requests until each has ended.

Every round asks the record what became of the lines that are under way, writes down those that have ended, and submits
as many new ones as there is room for. Nothing is remembered between rounds that is not in SQL, so a driver that takes
the batch over, or meets a database that was away, begins with a round like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from pydantic_core import to_json
from sqlalchemy.engine import Connection, Row

from gateway_app.batches import items
from gateway_app.batches.answers import refusal
from gateway_app.batches.claims import Claim
from gateway_app.batches.items import Ending, EndState, Outcome, Taken
from gateway_app.batches.lines import LineReader
from gateway_app.batches.ports import Services
from gateway_app.governance.api_keys import Caller
from tasks import lifecycle
from tasks.audit.events import Subject
from tasks.crypto import seal
from tasks.db import now
from tasks.errors import (
    Cancelled,
    DeadlinePassed,
    Expired,
    GatewayError,
    ServiceUnavailable,
    Unauthenticated,
)
from tasks.logs import get_logger

logger = get_logger(__name__)
#: Longest pause between rounds while nothing ends, as a multiple of `poll_s`.
_MAX_PAUSE = 8
#: After this many unexpected errors a line is failed instead of tried again.
_MAX_CRASHES = 3
_TOO_LATE = (Expired.code, DeadlinePassed.code)


class Execution:
    """Runs the lines of one batch."""

    def __init__(self, services: Services, claim: Claim, row: Row[Any]) -> None:
        self._services = services
        self._claim = claim
        self._batch_id: str = row.batch_id
        self._endpoint: str = row.endpoint
        self._expires_at: datetime = row.expires_at
        self._caller = Caller(row.api_key_id, row.organization)
        self._key = services.keys.unwrap(row.data_key, row.batch_id)
        file = services.files.find(row.input_file_id, row.organization, even_expired=True)
        self._lines = LineReader(services.files, file)
        self._taken: dict[str, Taken] = {}
        self._told: set[str] = set()
        self._crashes: Counter[int] = Counter()
        self._after = 0
        #: Whether no pending line is left.
        self._drained = False

    def rounds(self) -> Iterator[float]:
        """Run every line to its end. Yields how many seconds to pause between rounds. Raises ClaimLost."""
        database = self._services.database
        known = database.read(lambda connection: items.taken(connection, self._batch_id))
        self._taken = {item.request_id: item for item in known}
        pause = poll_s = self._services.limits.poll_s
        while True:
            row = self._claim.look()
            outcomes = database.read(lambda connection: items.outcomes(connection, list(self._taken)))
            stop, submitted = self._reason_to_stop(row), False
            progress = self._settle(outcomes, too_late=stop is not None and stop[0] == "expired")
            unknown = [item for item in self._taken.values() if item.request_id not in outcomes]
            if stop is not None:
                self._wind_up(*stop, unknown)
            elif not self._services.backoff.waiting:
                submitted = self._submit(unknown)
            if self._drained and not self._taken:
                return
            pause = poll_s if progress or submitted else min(pause * 2, poll_s * _MAX_PAUSE)
            yield 0 if submitted and len(self._taken) < self._services.limits.window else pause

    def _settle(self, outcomes: dict[str, Outcome], *, too_late: bool) -> bool:
        """Write down what has ended. Returns whether anything has."""
        endings, back = [], []
        for request_id, outcome in outcomes.items():
            item = self._taken[request_id]
            if outcome.to_retry:
                back.append(item)
            elif outcome.ended:
                endings.append(Ending(item, _end_state(outcome, too_late=too_late), outcome.code))
        self._record(endings, back)
        return bool(endings or back)

    def _record(self, endings: Sequence[Ending], back: Sequence[Taken] = ()) -> None:
        if not endings and not back:
            return

        def work(connection: Connection) -> None:
            items.give_back(connection, self._batch_id, back)
            items.end(connection, self._batch_id, endings)

        self._claim.write(work)
        for item in (*(ending.item for ending in endings), *back):
            del self._taken[item.request_id]
            self._told.discard(item.request_id)
        if back:
            self._after = min(self._after, *(item.line_number - 1 for item in back))
            self._drained = False

    # --- Submitting -------------------------------------------------------------------------------

    def _submit(self, unknown: list[Taken]) -> bool:
        """Submit lines that are taken but were not admitted, else new ones. Returns whether there was one."""
        limits, backoff = self._services.limits, self._services.backoff
        count = 1 if backoff.recovering else limits.group
        group = unknown[:count] or self._take(min(count, limits.window - len(self._taken)))
        endings = []
        for item, error in self._services.pool.map(self._submit_one, group):
            if error is not None:
                body = seal(self._key, to_json(refusal(error)), f"error:{self._batch_id}:{item.line_number}")
                state: EndState = "expired" if error.code in _TOO_LATE else "failed"
                endings.append(Ending(item, state, error.code, body))
        self._record(endings)
        return bool(group)

    def _take(self, count: int) -> list[Taken]:
        if self._drained or count <= 0:
            return []
        group = self._claim.write(lambda connection: items.take(connection, self._batch_id, self._after, count))
        self._drained = len(group) < count
        if group:
            self._after = group[-1].line_number
            self._taken |= {item.request_id: item for item in group}
        return group

    def _submit_one(self, item: Taken) -> tuple[Taken, GatewayError | None]:
        """Submit a line; return it with the refusal that ended it, if one did. Whatever else happened, SQL knows."""
        backoff = self._services.backoff
        if backoff.waiting:
            return item, None
        try:
            body = self._lines.body(item.byte_offset, item.byte_length)
            self._services.submit(
                self._caller, self._endpoint, body, request_id=item.request_id, deadline=self._expires_at
            )
        except ServiceUnavailable:
            backoff.failed()
        except GatewayError as error:
            return item, error
        except sa.exc.IntegrityError:
            logger.info("a line was submitted before", batch_id=self._batch_id, line=item.line_number)
        except Exception as error:  # one line's, whatever it is: the others must go on
            logger.error(
                "unexpected error in a line", batch_id=self._batch_id, line=item.line_number, error=type(error).__name__
            )
            self._crashes[item.line_number] += 1
            if self._crashes[item.line_number] >= _MAX_CRASHES:
                return self._refused(item)
        else:
            backoff.succeeded()
        return item, None

    def _refused(self, item: Taken) -> tuple[Taken, GatewayError | None]:
        """Give up on a line that cannot be submitted, unless it was."""
        error = GatewayError()
        try:
            self._services.database.write(lambda connection: self._bar(connection, item, error.code))
        except (sa.exc.IntegrityError, ServiceUnavailable):
            return item, None
        return item, error

    def _bar(self, connection: Connection, item: Taken, code: str) -> None:
        """Record a request that was never admitted as refused, so that nobody can admit it any more."""
        subject = Subject(item.request_id, self._caller.organization, self._caller.key_id)
        lifecycle.refuse(connection, subject, "failed", code, {})

    # --- Ending early -----------------------------------------------------------------------------

    def _reason_to_stop(self, row: Row[Any]) -> tuple[EndState, str, datetime | None] | None:
        """Return how the lines that have not run yet end, and since when those that run are to end too."""
        if row.status == "cancelling":
            return "cancelled", Cancelled.code, row.cancelling_at
        if row.expires_at <= now():
            return "expired", Expired.code, row.expires_at
        if row.revoked_at is not None:
            return "failed", Unauthenticated.code, None
        return None

    def _wind_up(self, state: EndState, code: str, since: datetime | None, unknown: Sequence[Taken]) -> None:
        if not self._drained:
            while self._claim.write(lambda connection: items.end_pending(connection, self._batch_id, state, code)):
                pass
            self._drained = True
        if unknown:
            endings = [Ending(item, state, code) for item in unknown]

            def work(connection: Connection) -> None:
                for item in unknown:
                    self._bar(connection, item, code)
                items.end(connection, self._batch_id, endings)

            try:
                self._claim.write(work)
            except sa.exc.IntegrityError:
                # One of them was admitted in this very moment; the next round knows.
                return
            for item in unknown:
                del self._taken[item.request_id]
        if since is None:
            return
        if now() > since + timedelta(seconds=self._services.limits.grace_s):
            self._record([Ending(item, state, code) for item in self._taken.values()])
            return
        list(self._services.pool.map(self._stop_one, set(self._taken) - self._told))

    def _stop_one(self, request_id: str) -> None:
        try:
            self._services.cancel(request_id, self._caller.organization)
        except ServiceUnavailable:
            return
        except GatewayError:
            # It has ended already.
            pass
        self._told.add(request_id)


def _end_state(outcome: Outcome, *, too_late: bool) -> EndState:
    # What is cancelled once the batch has expired was cancelled for that.
    if outcome.code in _TOO_LATE or (too_late and outcome.state == "cancelled"):
        return "expired"
    states: dict[str, EndState] = {"completed": "completed", "cancelled": "cancelled", "expired": "expired"}
    return states.get(outcome.state, "failed")
