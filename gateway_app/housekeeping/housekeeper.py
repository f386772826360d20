"""The thread that does the chores: once a second if it leads, else it only asks whether it may.

Each round of the leader:

1. If Redis has lost its data (`mark`), or could not be reached in the round before, all open requests are looked at, page by
   page, with a rest after each page that is as long as the page took, up to a tenth of a second.
2. Otherwise the walk through all open requests goes on for a tenth of a second. Where that does not reach the end, the
   newest requests are looked at as well: a gateway that dies between commit and publish leaves its request among these.
3. Running requests that Redis did not know the last time are looked at again.
4. What is overdue is ended. Once a minute, old idempotency keys are forgotten.
5. Every ten seconds, and first of all where Redis has lost its data, it is told again what is pinned.

Redis or the database away only means that the next round tries again.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

from gateway_app.housekeeping import walk
from gateway_app.housekeeping.census import Census
from gateway_app.housekeeping.ending import Endings
from gateway_app.housekeeping.leadership import Leadership
from gateway_app.housekeeping.losses import Losses
from gateway_app.housekeeping.mark import Mark
from gateway_app.housekeeping.pins import PinnedProfiles
from tasks.db import Database, now
from tasks.errors import DatabaseUnavailable, QueueUnavailable
from tasks.ids import lower_bound
from tasks.logs import get_logger
from tasks.metrics import housekeeper as metrics

ROUND_S = 1.0
#: How much of each round the walk through all open requests may take.
WALK_S = 0.1
LONGEST_REST_S = 0.1
#: How old the newest requests get. Whatever is published takes less, or its gateway has gone.
NEWEST_S = 15.0
FORGET_EVERY_S = 60.0
PINS_EVERY_S = 10.0
#: One that has done nothing for so long hangs: a page and a round take as long as Redis and the database may, at most.
STALLED_S = 120.0
logger = get_logger(__name__)


class Housekeeper:
    """Does the chores in a thread of its own, between `start` and `close`."""

    def __init__(
        self,
        database: Database,
        leadership: Leadership,
        mark: Mark,
        losses: Losses,
        endings: Endings,
        pins: PinnedProfiles,
    ) -> None:
        self._database, self._leadership, self._mark = database, leadership, mark
        self._losses, self._endings, self._pins = losses, endings, pins
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeper", daemon=True)
        self._leads = self._was_away = False
        self._after = ""
        self._known: set[str] = set()
        self._census = Census()
        self._forget_at = self._pins_at = 0.0
        self._moved_at = time.monotonic()

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """End after the page that is being looked at, and let another lead."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self._leadership.resign()
        except QueueUnavailable:
            logger.info("the queue is away; another housekeeper leads a few seconds later")

    def wrong(self) -> str | None:
        """Return why it had better be restarted, or None."""
        still_s = time.monotonic() - self._moved_at
        return f"the housekeeper has done nothing for {still_s:.0f} s" if still_s > STALLED_S else None

    def round(self) -> bool:
        """Do one round; tell whether this one leads. Raises QueueUnavailable or DatabaseUnavailable."""
        if not self._leadership.hold():
            self._leads = False
            self._losses.forgive()
            self._census.forget()
            return False
        if not self._leads:
            logger.info("this housekeeper leads")
            self._leads, self._after = True, ""
        if self._was_away:
            self._losses.forgive()
            self._mark.remove()
            self._was_away = False
        is_whole = self._mark.whole()
        if not is_whole or time.monotonic() >= self._pins_at:
            if changed := self._pins.renew():
                logger.info("redis is told again what is pinned", count=changed)
            self._pins_at = time.monotonic() + PINS_EVERY_S
        if not is_whole:
            self._look_at_everything()
        else:
            self._walk_on()
        self._losses.look_again()
        self._endings.expire()
        if time.monotonic() >= self._forget_at:
            self._endings.forget_keys()
            self._forget_at = time.monotonic() + FORGET_EVERY_S
        return True

    def _run(self) -> None:
        while not self._closing.is_set():
            began = self._moved_at = time.monotonic()
            try:
                outcome = "led" if self.round() else "stood_by"
            except QueueUnavailable:
                outcome, self._was_away = "queue_away", True
                logger.warning("the queue is away; once it is back, all open requests are looked at")
            except DatabaseUnavailable:
                outcome = "database_away"
                logger.warning("the database is away; trying again")
            except Exception as error:  # whatever it is, the next round may do better, and nobody else does the chores
                # Its text may quote what is stored.
                outcome = "failed"
                logger.error("housekeeping failed", error=type(error).__name__)
            metrics.ended(outcome)
            self._closing.wait(max(0.0, ROUND_S - (time.monotonic() - began)))

    def _look_at_everything(self) -> None:
        logger.warning("Redis has no mark, so it may have lost data: looking at all open requests")
        self._mark.begin()
        after, seen, lost, looked_again_at = "", 0, 0, time.monotonic()
        while not self._closing.is_set() and self._leadership.hold():
            began = time.monotonic()
            rows = self._page(after)
            if not rows:
                self._mark.finish()
                self._census.finish()
                logger.warning(
                    "looked at all open requests; those that were lost are queued again", seen=seen, lost=lost
                )
                return
            self._census.note(after, rows)
            lost += self._losses.look(rows)
            seen, after = seen + len(rows), rows[-1].request_id
            if began - looked_again_at >= ROUND_S:
                self._losses.look_again()
                looked_again_at = began
            self._closing.wait(min(time.monotonic() - began, LONGEST_REST_S))

    def _walk_on(self) -> None:
        until = time.monotonic() + WALK_S
        whole = self._after == ""
        while rows := self._page(self._after):
            self._census.note(self._after, rows)
            self._losses.look(rows)
            self._after = rows[-1].request_id
            if time.monotonic() >= until:
                whole = False
                break
        else:
            self._census.finish()
            self._after = ""
        if not whole:
            self._look_at_newest()

    def _look_at_newest(self) -> None:
        after = lower_bound(now() - timedelta(seconds=NEWEST_S))
        known: set[str] = set()
        while not self._closing.is_set() and (rows := self._page(after)):
            self._losses.look([row for row in rows if row.tag not in self._known])
            known.update(row.tag for row in rows)
            after = rows[-1].request_id
        self._known = known

    def _page(self, after: str) -> list[walk.OpenRequest]:
        self._moved_at = time.monotonic()
        return self._database.read(lambda connection: walk.page(connection, after, walk.PAGE))
