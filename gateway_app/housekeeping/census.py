"""Counting the open requests on the way through all of them, which is gone anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gateway_app.housekeeping.walk import OpenRequest
from tasks.db import now
from tasks.ids import made_at
from tasks.metrics import housekeeper as metrics

STATES = ("queued", "running")


class Census:
    """Counts pages of open requests, in the order of their ids; what is told is of the last whole walk."""

    def __init__(self) -> None:
        self._counted: Counter[str] = Counter()
        self._oldest: str | None = None

    def note(self, after: str, rows: Sequence[OpenRequest]) -> None:
        """Count the page that follows `after`, an id or nothing."""
        if not after:
            self._begin()
        self._counted.update("running" if row.running else "queued" for row in rows)
        self._oldest = self._oldest or rows[0].request_id

    def finish(self) -> None:
        """Tell what was counted: there is no other page."""
        for state in STATES:
            metrics.OPEN_REQUESTS.labels(state).set(self._counted[state])
        age_s = (now() - made_at(self._oldest)).total_seconds() if self._oldest else 0.0
        metrics.OLDEST_OPEN.set(max(0.0, age_s))
        self._begin()

    def forget(self) -> None:
        """Tell nothing any more: another counts."""
        self._begin()
        self.finish()

    def _begin(self) -> None:
        self._counted.clear()
        self._oldest = None
